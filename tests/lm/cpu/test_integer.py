"""Products in integers: exactly what NumPy makes of the same rounded numbers, by every kernel that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lm.cpu.grouped_linear import GroupedLinear, Kernel, kernel_for, kernels
from lm.cpu.packed_linear import pack_linear_layers
from lm.cpu.quantized import Bits, GroupedWeight, round_to_q4_0, round_to_q4_1, round_to_q8_0
from lm.layers.fuse import fuse_layers
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.helpers import prefill, random_parents, random_tokens
from tests.lm.tiny import CONFIGS, tiny_model, tiny_tokenizer
from treeline.config import ModelConfig
from treeline.errors import ConfigError

INTEGER = [kernel for kernel in kernels() if kernel.arithmetic == "int8"]


def in_steps(bits: Bits) -> Callable[[torch.Tensor], GroupedWeight]:
    """Groups with scales and minima of float32."""

    def round_to_steps(weight: torch.Tensor) -> GroupedWeight:
        values = weight.unflatten(1, (-1, 32))
        low, high = values.amin(2), values.amax(2)
        scale = (high - low) / (2**bits - 1)
        codes = ((values - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return GroupedWeight(bits, codes, scale, low)

    return round_to_steps


ROUNDING = {
    "Q4_0": round_to_q4_0,
    "Q4_1": round_to_q4_1,
    "Q8_0": round_to_q8_0,
    "steps of 4 bits": in_steps(4),
    "steps of 8 bits": in_steps(8),
}

pytestmark = pytest.mark.skipif(not INTEGER, reason="no kernel for integers runs here")


def multiplied_and_added(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    """a * b + c, rounded once: 64 bits hold the product, and a tie after them is too rare to be met."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def reference(weight: GroupedWeight, inputs: torch.Tensor) -> NDArray[np.float32]:
    """Inputs [tokens, columns] rounded by groups, and their products [tokens, rows]."""
    x = inputs.numpy().reshape(len(inputs), -1, 32)
    most = np.abs(x).max(2)
    nothing = most < 2.0**-100
    with np.errstate(all="ignore"):
        steps, scale = (
            np.where(nothing, 0, value).astype(np.float32) for value in (np.float32(127) / most, most / np.float32(127))
        )
    rounded = np.rint(x * steps[..., None]).astype(np.int64)
    codes = weight.codes.numpy().astype(np.int64) - (128 if weight.minimum is None else 0)
    total = np.zeros((len(x), len(codes)), np.float32)
    for g in range(codes.shape[1]):
        part = weight.scale[:, g].float().numpy() * (rounded[:, g] @ codes[:, g].T).astype(np.float32)
        if weight.minimum is not None:
            sums = rounded[:, g].sum(1, keepdims=True).astype(np.float32)
            part = multiplied_and_added(weight.minimum[:, g].float().numpy(), sums, part)
        total = multiplied_and_added(scale[:, g, None], part, total)
    return total


def extremes() -> Iterator[tuple[GroupedWeight, torch.Tensor]]:
    """The largest codes of both sides at once, groups of zeros, and numbers near the ends of float32."""
    inputs = torch.ones(6, 64)
    inputs[1] *= -1
    inputs[2, :32] = 0.0
    inputs[3] *= 1e-36
    inputs[4] *= 1e30
    inputs[5, ::2] *= -1
    minima: dict[Bits, torch.Tensor | None] = {4: torch.ones(40, 2).half(), 8: None}
    for bits, minimum in minima.items():
        for code in (0, 2**bits - 1):
            codes = torch.full((40, 2, 32), code, dtype=torch.uint8)
            yield GroupedWeight(bits, codes, torch.ones(40, 2).half(), minimum), inputs


@pytest.mark.parametrize("kernel", INTEGER)
@pytest.mark.parametrize("name", ROUNDING)
def test_every_bit_is_that_of_the_reference(name: str, kernel: Kernel) -> None:
    rng = np.random.default_rng(int(kernel))
    for _ in range(6):
        rows, groups, tokens = (int(rng.integers(1, most)) for most in (100, 8, 30))
        weight = ROUNDING[name](torch.randn(rows, 32 * groups) * 0.05)
        inputs, bias = torch.randn(tokens, 32 * groups), torch.randn(rows)
        expected = reference(weight, inputs)
        assert np.array_equal(GroupedLinear(weight, None, kernel)(inputs).numpy(), expected)
        assert np.array_equal(GroupedLinear(weight, bias, kernel)(inputs).numpy(), expected + bias.numpy())


@pytest.mark.parametrize("kernel", INTEGER)
def test_extreme_numbers_are_summed_exactly(kernel: Kernel) -> None:
    for weight, inputs in extremes():
        assert np.array_equal(GroupedLinear(weight, None, kernel)(inputs).numpy(), reference(weight, inputs))


def test_rounding_inputs_changes_little() -> None:
    weight, inputs = round_to_q4_1(torch.randn(200, 576) * 0.05), torch.randn(50, 576)
    exact, rounded = (GroupedLinear(weight, None, kernel)(inputs) for kernel in (kernels()[0], INTEGER[-1]))
    assert (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_token_has_the_same_logits_alone_and_in_any_batch(kind: str) -> None:
    config = CONFIGS[kind].__class__(**CONFIGS[kind].to_dict() | {"hidden_size": 64, "num_attention_heads": 4})
    hf = tiny_model(config)
    fuse_layers(hf)
    pack_linear_layers(hf, "int8")
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    assert model.arithmetic.startswith("int8")
    rng = np.random.default_rng(1)
    cache = model.new_cache(1024, 4)
    prompt = random_tokens(rng, 19)
    first = prefill(model, cache, prompt, 40)
    tokens, parents = random_tokens(rng, 12), random_parents(rng, 12)
    alone = model.forward([PackedSequence(first, tokens, parents)], cache)
    others = [prefill(model, cache, random_tokens(rng, 5 + 3 * i), 16) for i in range(4)]
    again = prefill(model, cache, prompt, 40)
    beside = [PackedSequence(other, random_tokens(rng, 1 + i)) for i, other in enumerate(others)]
    for place in range(len(beside)):
        for sequence in (again, *others):
            sequence.scratch = 0
        batch = [*beside[:place], PackedSequence(again, tokens, parents), *beside[place:]]
        logits = model.forward(batch, cache)
        start = sum(len(sequence.token_ids) for sequence in batch[:place])
        assert torch.equal(logits[start : start + len(tokens)], alone)


def test_the_setting_decides(tmp_path: Path) -> None:
    hf = tiny_model(
        CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"hidden_size": 64, "num_attention_heads": 4})
    )
    hf.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for arithmetic, expected in (("auto", "int8"), ("int8", "int8"), ("float32", "float32")):
        config = ModelConfig.model_validate(
            {"model": str(tmp_path), "device": "cpu", "quantization": "int8", "arithmetic": arithmetic}
        )
        assert LanguageModel.load(config).arithmetic.startswith(expected)
    with pytest.raises(ConfigError, match="needs weights in groups"):
        LanguageModel.load(ModelConfig(model=str(tmp_path), device="cpu", dtype="float32", arithmetic="int8"))
    assert LanguageModel.load(ModelConfig(model=str(tmp_path), device="cpu", dtype="float32")).arithmetic == ""


def test_auto_is_the_widest_kernel_for_integers() -> None:
    assert kernel_for("auto") == kernel_for("int8") == INTEGER[-1]
    assert kernel_for("float32") == max(kernel for kernel in kernels() if kernel.arithmetic == "float32")
