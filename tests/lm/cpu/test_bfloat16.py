"""Weights in bfloat16 keep their 2 bytes, and give the bits of the same weights in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lm import device
from lm.cpu.grouped_linear import GroupedLinear, Kernel, kernels
from lm.cpu.packed_linear import PackedLinear
from lm.cpu.quantized import Bfloat16Weight, find_bfloat16
from lm.model import LanguageModel
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, engine_for, run, tokens_of
from treeline.config import ModelConfig
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import GenerationRequest

pytestmark = pytest.mark.skipif(not kernels(), reason="the kernels were not built")
FLOAT_KERNELS = [kernel for kernel in kernels() if kernel.arithmetic == "float32"]


def some_weight(rows: int, columns: int) -> Bfloat16Weight:
    return Bfloat16Weight(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16())


def summed_in_order(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] and [tokens, columns] -> [tokens, rows]: each sum runs from the first input to the last.

    A product is exact in float64.
    """
    sums = np.zeros((len(inputs), len(weight)), np.float32)
    for column in range(weight.shape[1]):
        product = np.outer(inputs[:, column].astype(np.float64), weight[:, column])
        sums = (sums + product).astype(np.float32)
    return sums


@pytest.mark.parametrize("kernel", FLOAT_KERNELS)
def test_the_bits_are_those_of_float32_weights(kernel: Kernel) -> None:
    weight, bias, inputs = some_weight(70, 96), torch.randn(70), torch.randn(100, 96)
    expected = summed_in_order(weight.values.float().numpy(), inputs.numpy()) + bias.numpy()
    layer = GroupedLinear(weight, bias, kernel)
    for tokens in (1, 2, 3, 5, 8, 13, 100):
        assert np.array_equal(layer(inputs[:tokens]).numpy(), expected[:tokens])
        assert np.array_equal(layer(inputs[-tokens:]).numpy(), expected[-tokens:])


def test_only_what_loses_nothing_is_kept_in_two_bytes() -> None:
    weight = some_weight(8, 64).values.float()
    found = find_bfloat16(weight)
    assert found is not None
    assert torch.equal(found.values.float(), weight)
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    assert find_bfloat16(weight) is None
    assert find_bfloat16(weight[:, :48]) is None


def test_a_checkpoint_in_bfloat16_writes_what_transformers_writes_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "has_bfloat16_kernels", lambda: True)
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"hidden_size": 64, "num_attention_heads": 4})
    tiny_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = LanguageModel.load(ModelConfig(model=str(tmp_path), device="cpu"))
    assert model.dtype == torch.float32
    assert not any(isinstance(module, PackedLinear) for module in model.hf.modules())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    norms = 5 * 64
    floats = sum(weight.numel() for weight in reference.parameters()) - 260 * 64 - norms
    assert 2 * floats + 4 * norms <= model.weight_bytes < 2.2 * floats + 4 * norms  # rows are padded
    prompt = list(range(40, 60))
    answer = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=-1)
    expected = answer[0, len(prompt) :].tolist()
    known = Known()
    known.add(prompt, expected)
    request = GenerationRequest("r", prompt, SamplingParams(), 16, ignore_eos=True, policy="static:2-1-1")
    outputs = run(engine_for(model, OracleDrafter(known, model.vocab_size)), [request])
    assert tokens_of(outputs["r"]) == expected
