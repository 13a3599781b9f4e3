"""Grouped weights are found without loss, laid out for the kernel, and multiplied as float32 weights are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn
from transformers import PreTrainedModel

from lm.cpu.grouped_linear import GroupedLinear, Kernel, kernels
from lm.cpu.quantized import GroupedWeight, find_groups, find_smaller, round_to_q4_0, round_to_q4_1, round_to_q8_0
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import random_tokens, reference_logits
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer
from tests.lm.tiny_gguf import random_blocks
from treeline.config import ModelConfig
from treeline.errors import ConfigError

compiled = pytest.mark.skipif(not kernels(), reason="the kernels were not built")
FORMATS = {"Q4_0": (round_to_q4_0, 4), "Q4_1": (round_to_q4_1, 4), "Q8_0": (round_to_q8_0, 8)}
STEPS = {"Q5_0": 8, "Q5_1": 8, "Q4_K": 4, "Q5_K": 8, "Q6_K": 16}
"""Bits in which other formats are kept, with scales of float32."""


def as_gguf_stores(weight: torch.Tensor, name: str) -> torch.Tensor:
    kind = GGMLQuantizationType[name]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))


def some_blocks(name: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(random_blocks(name, 70, 512), GGMLQuantizationType[name]))


def some_weight(rows: int = 70, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("name", FORMATS)
def test_groups_of_a_gguf_file_are_found_without_loss(name: str) -> None:
    weight = as_gguf_stores(some_weight(), name)
    weight[3, 32:64] = 0.0
    found = find_groups(weight)
    assert found is not None
    assert found.bits == FORMATS[name][1]
    assert torch.equal(found.floats(), weight)


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_other_gguf_formats_are_found_without_loss(name: str) -> None:
    weight = some_blocks(name)
    weight[3, 32:64] = 0.0
    found = find_smaller(weight)
    assert isinstance(found, GroupedWeight)
    assert (found.bits, found.scale.dtype) == (STEPS[name], torch.float32)
    assert torch.equal(found.floats(), weight)


@compiled
@pytest.mark.parametrize("kernel", [kernel for kernel in kernels() if kernel.arithmetic == "float32"])
@pytest.mark.parametrize("name", STEPS)
def test_kernels_read_every_bit_of_other_formats(name: str, kernel: Kernel) -> None:
    weight = some_blocks(name)
    found = find_smaller(weight)
    assert found is not None
    layer, ones = GroupedLinear(found, None, kernel), torch.eye(512)
    for tokens in (1, 3, 100):
        assert torch.equal(layer(ones[-tokens:]), weight[:, -tokens:].T + 0.0)


def test_other_weights_are_not_taken_for_groups() -> None:
    assert find_groups(some_weight()) is None
    assert find_groups(some_weight(columns=48)) is None
    assert find_groups(some_weight().bfloat16()) is None
    weight = as_gguf_stores(some_weight(), "Q4_1")
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    assert find_groups(weight) is None
    for near in (some_weight(), weight * torch.pi, weight.fill_(torch.nan)):
        assert find_smaller(near) is None


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_loses_no_more_than_gguf_does(name: str) -> None:
    weight = some_weight()
    rounded = FORMATS[name][0](weight).floats()
    assert (rounded - weight).square().mean() <= 1.05 * (as_gguf_stores(weight, name) - weight).square().mean()


@compiled
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 100, 200])
def test_the_product_is_that_of_the_float_weights(name: str, bias: bool, tokens: int) -> None:
    weight: GroupedWeight = FORMATS[name][0](some_weight())
    added = torch.randn(70) if bias else None
    inputs = torch.randn(1, tokens, 96)
    outputs = GroupedLinear(weight, added, Kernel.FLOAT32)(inputs)
    exact = nn.functional.linear(inputs.double(), weight.floats().double(), None if added is None else added.double())
    torch.testing.assert_close(outputs.double(), exact, rtol=2**-20, atol=1e-6)


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_however_many_threads_run(name: str, kernel: Kernel) -> None:
    layer = GroupedLinear(FORMATS[name][0](some_weight(960, 576)), None, kernel)
    inputs = torch.randn(1, 130, 576)
    whole = layer(inputs)
    threads = torch.get_num_threads()
    for rows in (1, 2, 3, 7, 16, 33, 97):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(layer(inputs[:, :rows]), whole[:, :rows])
        assert torch.equal(layer(inputs[:, -rows:]), whole[:, -rows:])
    torch.set_num_threads(threads)


@pytest.mark.skipif(Kernel.FLOAT32_WIDE not in kernels(), reason="no vectors of 16")
@pytest.mark.parametrize("name", FORMATS)
def test_wide_vectors_give_the_same_bits(name: str) -> None:
    weight, bias = FORMATS[name][0](some_weight(rows=200)), torch.randn(200)
    narrow, wide = (GroupedLinear(weight, bias, kernel) for kernel in (Kernel.FLOAT32, Kernel.FLOAT32_WIDE))
    for tokens in [*range(1, 27), 100]:
        inputs = torch.randn(tokens, 96)
        assert torch.equal(narrow(inputs), wide(inputs))


@compiled
def test_inputs_need_not_lie_side_by_side() -> None:
    layer = GroupedLinear(round_to_q8_0(some_weight()), None, Kernel.FLOAT32)
    inputs = torch.randn(96, 5)
    assert torch.equal(layer(inputs.T), layer(inputs.T.contiguous()))


def saved(folder: Path) -> PreTrainedModel:
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"hidden_size": 64, "num_attention_heads": 4})
    model = tiny_model(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@compiled
@pytest.mark.parametrize(("quantization", "layers", "head"), [("int8", "Q8_0", "Q8_0"), ("int4", "Q4_1", "Q8_0")])
def test_a_rounded_model_is_the_one_transformers_runs_with_rounded_weights(
    tmp_path: Path, quantization: str, layers: str, head: str
) -> None:
    reference = saved(tmp_path)
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            name = head if module is reference.get_output_embeddings() else layers
            module.weight.data = FORMATS[name][0](module.weight.data).floats()
    model = LanguageModel.load(ModelConfig(model=str(tmp_path), quantization=quantization, arithmetic="float32"))
    linear = [module for module in model.hf.modules() if isinstance(module, GroupedLinear)]
    assert (len(linear), model.dtype) == (9, torch.float32)
    cache, tokens = model.new_cache(64, 16), random_tokens(np.random.default_rng(0), 24)
    sequence = cache.allocate(24)
    assert sequence is not None
    logits = model.forward([PackedSequence(sequence, tokens)], cache)
    torch.testing.assert_close(logits, reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


@compiled
def test_weights_of_a_gguf_file_stay_in_their_groups(tmp_path: Path) -> None:
    reference = saved(tmp_path)
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = as_gguf_stores(module.weight.data, "Q4_1")
    reference.save_pretrained(tmp_path)
    for quantization, grouped in (("auto", 9), ("none", 0)):
        model = LanguageModel.load(ModelConfig(model=str(tmp_path), dtype="float32", quantization=quantization))
        assert sum(isinstance(module, GroupedLinear) for module in model.hf.modules()) == grouped
        floats = sum(weight.numel() for weight in reference.parameters()) - 260 * 64
        norms = 5 * 64
        if grouped:
            assert model.weight_bytes > 4 * norms + 5 * (floats - norms) / 8  # and some more: rows are padded
            assert model.weight_bytes < 4 * norms + 5.5 * (floats - norms) / 8
        else:
            assert model.weight_bytes == 4 * floats


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes float32 inputs"):
        LanguageModel.load(ModelConfig(quantization="int8", dtype="bfloat16", device="cpu"))
