"""One model on two ranks, by gloo on the CPU: the numbers and the text of one rank, and no life without the other."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lm import parallel
from lm.layers.sharded import GatheredLinear, Shard, keep_shard
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.parallel import Followers, _packed, _unpacked, load_model
from tests.lm.helpers import prefill, random_parents, random_tokens
from tests.lm.tiny import tiny_llama, tiny_model, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, engine_for, plain_greedy, run, tokens_of
from treeline.config import ModelConfig, VerifierConfig
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import GenerationRequest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LanguageModel, LanguageModel]]:
    """The same model on one rank and on two."""
    folder: Path = tmp_path_factory.mktemp("target") / "tiny"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = ModelConfig(model=str(folder), device="cpu", dtype="float32", quantization="none")
    two = load_model(config.model_copy(update={"tensor_parallel": 2}))
    yield LanguageModel.load(config), two
    followers_of(two).close()


def followers_of(model: LanguageModel) -> Followers:
    return model.passes.announce.__self__  # type: ignore[union-attr]


def test_logits_are_those_of_one_rank_also_after_entries_moved(models: tuple[LanguageModel, LanguageModel]) -> None:
    rng = np.random.default_rng(0)
    prompt, nodes, parents = random_tokens(rng, 19), random_tokens(rng, 8), random_parents(rng, 8)
    results = []
    for model in models:
        cache = model.new_cache(128, 4)
        sequence = prefill(model, cache, prompt, 16)
        logits = [model.forward([PackedSequence(sequence, nodes, parents)], cache)]
        cache.commit([(sequence, [3, 6])])
        logits.append(model.forward([PackedSequence(sequence, nodes[:2], None, "last")], cache))
        results.append(torch.cat(logits))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-5)
    assert models[1].layers[0].kv_heads == 1, "each rank holds a part of the cache"


def test_text_is_that_of_one_rank(models: tuple[LanguageModel, LanguageModel]) -> None:
    plain, two = LanguageModel.from_hf(tiny_llama(), tiny_tokenizer()), models[1]
    rng, known, requests = np.random.default_rng(1), Known(), []
    for index, policy in enumerate(("off", "chain:3", "static:2-1-1", "smart") * 2):
        prompt = random_tokens(rng, 3 + 4 * index)
        known.add(prompt, plain_greedy(plain, prompt, 16))
        requests.append(GenerationRequest(f"r{index}", prompt, SamplingParams(), 16, ignore_eos=True, policy=policy))
    outputs = run(engine_for(two, OracleDrafter(known, two.vocab_size)), requests)
    assert [tokens_of(outputs[request.request_id]) for request in requests] == [answer for _, answer in known.answers]
    assert sum(outputs[request.request_id][-1].speculation.accepted_nodes for request in requests) > 0


def test_a_pass_comes_out_of_its_array_as_it_went_in(models: tuple[LanguageModel, LanguageModel]) -> None:
    cache = models[0].new_cache(256, 8)
    first, second = cache.allocate(40), cache.allocate(9)
    first.length, first.scratch = 17, 2
    given = [
        PackedSequence(first, [5, 6], np.array([-1, 0, 1, 1], np.int32)),
        PackedSequence(second, [7], None, "none"),
    ]
    slots, block_tokens, found = _unpacked(_packed(given, cache))
    assert (slots, block_tokens) == (256, 8)
    for there, here in zip(found, given, strict=True):
        assert (there.token_ids, there.logits) == (here.token_ids, here.logits)
        assert np.array_equal(there.parents, here.parents) if here.parents is not None else there.parents is None
        assert (there.cache.length, there.cache.scratch) == (here.cache.length, here.cache.scratch)
        end = here.cache.length + here.cache.scratch + len(here.token_ids)
        assert np.array_equal(there.cache.slots(0, end), here.cache.slots(0, end))


def test_a_vocabulary_that_ranks_cannot_share_evenly_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, inputs = nn.Linear(4, 7), torch.randn(3, 4)
    parts = [GatheredLinear(linear, Shard(rank, 3)) for rank in range(3)]
    monkeypatch.setattr("lm.layers.sharded.gathered", lambda own, size: [part.linear(inputs) for part in parts])
    torch.testing.assert_close(parts[0](inputs), linear(inputs))


@pytest.mark.parametrize(("kind", "size"), [("llama", 3), ("gpt2", 2)])
def test_what_cannot_be_shared_is_refused(kind: str, size: int) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel"):
        keep_shard(tiny_model(kind), Shard(0, size))


def test_a_replica_needs_a_device_for_each_rank() -> None:
    with pytest.raises(ValueError, match="num_gpus: 2"):
        VerifierConfig(target=ModelConfig(device="cuda", tensor_parallel=2))


def test_a_follower_ends_with_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = multiprocessing.Pipe()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(sentinel=reader))
    ended = threading.Event()
    monkeypatch.setattr(parallel.os, "_exit", lambda code: ended.set())
    threading.Thread(target=parallel._end_with_rank_0).start()
    assert not ended.wait(0.1)
    writer.close()
    assert ended.wait(10)


def test_the_process_ends_with_a_follower(
    models: tuple[LanguageModel, LanguageModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one: it kills the other rank."""
    ended = threading.Event()
    monkeypatch.setattr(parallel.os, "_exit", lambda code: code == 1 and ended.set())
    followers_of(models[1]).processes[0].kill()
    assert ended.wait(10)
    assert "a rank of the model ended" in caplog.text
