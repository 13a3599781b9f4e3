"""Nothing that goes wrong on a device makes passes slower in silence, or for longer than it has to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm.cuda import graphs
from lm.cuda.graphs import Graphs
from lm.cuda.layout import BUCKETS
from lm.cuda.static_pass import StaticPasses
from lm.draft_head import DraftHead, save_head, shared_layers
from lm.kv_cache import KVCache, LayerShape
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.passes import Passes
from tests.lm.helpers import pad_passes, random_tokens, reference_logits
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import tiny_draft_ids, tiny_head_module
from treeline.config import ModelConfig
from treeline.errors import ConfigError


class Device:
    """Stands for the parts of CUDA that captures use, on CPU tensors.

    Attributes:
        fails: what the next captures raise.
        free_bytes: memory that is free.
        now_s: the time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails: list[Exception] = []
        self.free_bytes, self.now_s = 8 << 30, 0.0
        cuda = type("cuda", (), {"type": "cuda"})()
        start = Graphs.__init__

        def begin(own: Graphs, device: torch.device) -> None:
            start(own, device)
            own._device = cuda

        def capture(own: Graphs, body: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[Any, Any]:
            outputs = own._shared_for(body())
            if self.fails:
                raise self.fails.pop()

            def replay() -> None:
                for place, output in zip(outputs, body(), strict=True):
                    place.copy_(output)

            return type("Graph", (), {"replay": staticmethod(replay)})(), outputs

        monkeypatch.setattr(Graphs, "__init__", begin)
        monkeypatch.setattr(Graphs, "_capture", capture)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free_bytes, 80 << 30))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(graphs.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def model() -> LanguageModel:
    made = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    pad_passes(made.passes)
    made.passes._unpadded = "packed"  # As on the device.
    return made


def one_pass(model: LanguageModel, cache: KVCache) -> str:
    """How a pass over three tokens ran; its logits are right in any case."""
    sequence = cache.allocate(4)
    assert sequence is not None
    logits = model.forward([PackedSequence(sequence, [5, 6, 7])], cache)
    torch.testing.assert_close(logits, reference_logits(model.hf, [5, 6, 7]), rtol=1e-4, atol=2e-5)
    cache.free(sequence)
    return model.passes.how


def test_a_pass_says_how_it_ran(device: Device, model: LanguageModel) -> None:
    cache = model.new_cache(64, 16)
    assert [one_pass(model, cache), one_pass(model, cache)] == ["replayed", "replayed"]
    model.passes.padded = False
    assert one_pass(model, cache) == "packed"
    assert model.passes.counts == {"replayed": 2, "packed": 1}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("operation not permitted")])
def test_a_size_that_cannot_be_captured_runs_uncaptured_and_is_tried_again(
    device: Device, model: LanguageModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    cache = model.new_cache(64, 16)
    device.fails = [error]
    assert [one_pass(model, cache), one_pass(model, cache)] == ["eager", "eager"]
    assert "not captured" in caplog.text
    device.now_s += graphs.RETRY_S
    assert one_pass(model, cache) == "replayed"
    assert model.passes.padded


def test_captured_passes_are_not_dropped_in_silence(
    device: Device, model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache = model.new_cache(64, 16)
    model.tap((1,))
    assert not caplog.text
    assert one_pass(model, cache) == "replayed"
    model.tap((2,))
    assert "dropped" in caplog.text
    assert one_pass(model, cache) == "replayed"


def test_ranks_in_lockstep_do_not_run_a_pass_in_another_way(device: Device, model: LanguageModel) -> None:
    """The others would wait for it, or add up other numbers."""
    model.passes.in_lockstep = True
    device.fails = [torch.OutOfMemoryError("no memory")]
    with pytest.raises(torch.OutOfMemoryError):
        one_pass(model, model.new_cache(64, 16))


def test_little_free_memory_is_said_and_does_not_last(
    device: Device, model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    cache = model.new_cache(64, 16)
    device.free_bytes = graphs.SPARE_BYTES - 1
    assert one_pass(model, cache) == "eager"
    assert "1023 MiB" in caplog.text
    device.free_bytes, device.now_s = 8 << 30, graphs.RETRY_S
    assert one_pass(model, cache) == "replayed"


def failing_once(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    run, fails = StaticPasses.run, [*errors]

    def failing(own: StaticPasses, *args: Any) -> Any:
        if fails:
            raise fails.pop()
        return run(own, *args)

    monkeypatch.setattr(StaticPasses, "run", failing)


def test_a_pass_without_memory_is_packed_and_the_next_one_is_not(
    device: Device, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_once(monkeypatch, torch.OutOfMemoryError("no memory"))
    cache = model.new_cache(64, 16)
    assert [one_pass(model, cache), one_pass(model, cache)] == ["packed", "replayed"]


def test_a_pass_in_parts_says_how_the_slowest_ran(
    device: Device, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, texts = model.new_cache(1024, 16), [[5] * 500, [6] * 20]
    for error in ([], [torch.OutOfMemoryError("no memory")]):
        failing_once(monkeypatch, *error)
        packed = [PackedSequence(cache.allocate(len(text)), text, None, "last") for text in texts]
        model.forward(packed, cache)
        for sequence in packed:
            cache.free(sequence.cache)
        assert model.passes.how == ("packed" if error else "replayed")
    assert model.passes.counts == {"replayed": 3, "packed": 1}


def test_only_what_cannot_be_compiled_is_final(
    device: Device, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_once(monkeypatch, RuntimeError("Failed to find C compiler"))
    monkeypatch.setattr(model.passes, "_device", type("cuda", (), {"type": "cuda"})())
    cache = model.new_cache(64, 16)
    monkeypatch.setattr("lm.passes.upload", lambda array, device: torch.from_numpy(array))
    assert [one_pass(model, cache), one_pass(model, cache)] == ["packed", "packed"]
    assert "Failed to find C compiler" in caplog.text
    assert model.passes.slow == 2


def test_a_start_that_requires_captured_passes_fails_without_them(device: Device, model: LanguageModel) -> None:
    model.passes.required = True
    with pytest.raises(ConfigError, match="only 9 of 21 passes"):
        model.capture(model.new_cache(64, 16))
    plain = LanguageModel(model.hf, model.tokenizer, "tiny", required=True)
    with pytest.raises(ConfigError, match="only 0 of 21"):
        plain.capture(plain.new_cache(64, 16))


def test_a_draft_head_captures_its_passes_where_its_target_has_to(model: LanguageModel, tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "head"
    model.hf.save_pretrained(target)
    model.tokenizer.save_pretrained(target)
    save_head(folder, tiny_head_module(model.hf), shared_layers(model.hf, tiny_draft_ids())[1].weight, tiny_draft_ids())
    for how in ("auto", "require"):
        head = DraftHead.load(folder, ModelConfig(model=str(target), dtype="float32", device="cpu", cuda_graphs=how))
        assert head.passes.required == (how == "require")
    with pytest.raises(ConfigError, match="only 0 of 21"):
        head.capture(head.new_cache(64, 16))


def test_small_sizes_put_their_outputs_where_large_ones_do() -> None:
    shared = Graphs(torch.device("cpu"))
    large = shared._shared_for((torch.zeros(8, 3), torch.zeros(8, 5)))
    small = shared._shared_for((torch.zeros(2, 3), torch.zeros(2, 5)))
    assert [a.data_ptr() for a in large] == [b.data_ptr() for b in small]
    assert [len(b) for b in small] == [2, 2]


def test_too_many_sequences_run_as_several_passes(model: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    texts = [random_tokens(rng, count) for count in (300, 200, 100, 5)]
    cache = model.new_cache(1024, 16)
    packed = [PackedSequence(cache.allocate(len(text)), text, None, "last") for text in texts]
    logits = model.forward(packed, cache)
    assert model.passes.counts == {"eager": 2}
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, reference_logits(model.hf, text)[-1], rtol=1e-4, atol=2e-5)
    assert model.passes.most_tokens == BUCKETS[-1]


def test_a_cache_takes_what_the_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(KVCache, "__init__", lambda own, layers, tokens, block, *rest: made.append((tokens, block)))
    layers, bf16, cuda = [LayerShape(8, 128, 128)] * 32, torch.bfloat16, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 30, 80 << 30))
    KVCache.sized(layers, "auto", "auto", bf16, cuda)
    KVCache.sized(layers, 4096, 16, bf16, cuda)
    KVCache.sized(layers, "auto", "auto", bf16, torch.device("cpu"))
    assert made == [(int(0.9 * 64 - 6) * 8192 + 4915, 128), (4096, 16), (16384, 16)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 80 << 30))
    with pytest.raises(ConfigError, match="does not fit the device"):
        KVCache.sized(layers, "auto", "auto", bf16, cuda)


def test_passes_on_a_cpu_are_native_and_none_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer())
    assert one_pass(model, model.new_cache(64, 16)) == "native"
    assert model.passes.slow == 0
    assert not caplog.text
    assert isinstance(model.passes, Passes)
