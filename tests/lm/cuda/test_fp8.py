"""8-bit floating-point products: rounding by the kernel's own source, interpreted; products by torch on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lm import device
from lm.cpu.packed_linear import read_bytes
from lm.cuda.elementwise import TritonElementwise
from lm.cuda.fp8 import LARGEST, Fp8Linear, round_linear_layers, rounded_rows
from lm.device import torch_dtype
from lm.layers.fuse import fuse_layers
from lm.layers.fused import Norm
from lm.layers.sharded import SummedLinear
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import pad_passes, random_tokens, reference_logits
from tests.lm.tiny import tiny_model, tiny_tokenizer
from treeline.config import ModelConfig
from treeline.errors import ConfigError


def test_rows_are_rounded_as_torch_rounds_them() -> None:
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1e-3, 50, 0, 7.0])[:, None]
    rounded, scales = rounded_rows(rows)
    expected = rows.abs().amax(1).clamp(min=1e-12) / LARGEST
    torch.testing.assert_close(scales, expected)
    exact = (rows / expected[:, None]).to(torch.float8_e4m3fn)
    same = rounded.view(torch.uint8) == exact.view(torch.uint8)
    assert same.float().mean() > 0.98, "the interpreter loses a carry where a mantissa overflows"
    torch.testing.assert_close((rounded.float() * scales[:, None])[same], rows[same], rtol=0.07, atol=0.02)


def test_a_norm_rounds_at_once_what_it_would_give() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, added = (torch.randn(1, 5, 48, generator=generator).to(torch.bfloat16) for _ in range(2))
    norm, rounding = (Norm(LlamaRMSNorm(48).to(torch.bfloat16)) for _ in range(2))
    rounding.rounds = True
    work = TritonElementwise()
    (total, normed), (same_total, found) = (work.add_norm(hidden, added, each) for each in (norm, rounding))
    for plain, rounded in ((normed, found), (work.norm(hidden, norm), work.norm(hidden, rounding))):
        expected = rounded_rows(plain)
        assert torch.equal(rounded.numbers.view(torch.uint8), expected.numbers.view(torch.uint8))
        assert torch.equal(rounded.scales, expected.scales)
    assert torch.equal(total, same_total)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_nearly_that_of_the_exact_weights(bias: bool) -> None:
    torch.manual_seed(0)  # a carry that the interpreter loses can put a draw outside the tolerance
    linear = nn.Linear(64, 32, bias=bias).to(torch.bfloat16)
    inputs = torch.randn(1, 3, 64).to(torch.bfloat16)
    rounded = Fp8Linear(linear)
    torch.testing.assert_close(rounded(inputs), linear(inputs), rtol=0.1, atol=0.1)
    assert torch.equal(rounded(inputs[:, :1]), rounded(inputs)[:, :1]), "a row is rounded by itself"
    assert read_bytes(rounded) == 64 * 32 + (64 if bias else 0)


def test_a_model_that_is_fused_and_rounded_is_nearly_the_same() -> None:
    hf = tiny_model("llama")
    tokens = random_tokens(np.random.default_rng(0), 9)
    expected = reference_logits(hf, tokens)
    hf = hf.to(torch.bfloat16)
    fuse_layers(hf, finish=round_linear_layers)
    kinds = {name: type(layer) for name, layer in hf.named_modules() if name.endswith(("proj", "lm_head"))}
    assert {kind for name, kind in kinds.items() if name != "lm_head"} == {Fp8Linear}
    assert kinds["lm_head"] is nn.Linear
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    for run in (tokens, tokens[:4]):
        cache = model.new_cache(32, 16)
        logits = model.forward([PackedSequence(cache.allocate(16), run)], cache)
        assert torch.nn.functional.cosine_similarity(logits, expected[: len(run)], dim=1).mean() > 0.97
        pad_passes(model.passes, interpreted=True)  # The second one: norms of a padded pass round at once.


def test_only_plain_layers_of_fitting_sizes_are_rounded() -> None:
    class Scaled(nn.Linear):
        pass

    summed = SummedLinear(nn.Linear(32, 16), slice(0, 32), 2)
    model = nn.ModuleDict({"other": Scaled(16, 16), "odd": nn.Linear(16, 24), "shard": summed})
    round_linear_layers(model)
    assert [type(model[name]) for name in ("other", "odd")] == [Scaled, nn.Linear]
    assert type(summed.linear) is Fp8Linear


def test_it_needs_a_device_that_multiplies_such_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fp8"):
        torch_dtype(ModelConfig(quantization="fp8", device="cpu"))
    monkeypatch.setattr(device, "torch_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert torch_dtype(ModelConfig(quantization="fp8", device="cuda")) == torch.bfloat16
    with pytest.raises(ConfigError, match="float32"):
        torch_dtype(ModelConfig(quantization="fp8", device="cuda", dtype="float32"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"8\.9"):
        torch_dtype(ModelConfig(quantization="fp8", device="cuda"))
