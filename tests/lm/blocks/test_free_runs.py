"""Free blocks as runs: the same as a plain set of them, and quick at the size of a GPU."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lm.blocks.free_runs import FreeRuns
from lm.kv_cache import KVCache, LayerShape


def test_the_shortest_run_that_fits_is_cut() -> None:
    runs = FreeRuns(20)
    assert runs.take(20) == list(range(20))
    runs.add([3, 4, 5, 9, 10, 15])
    assert runs.take(2) == [9, 10]
    assert runs.take(1) == [15]
    assert runs.take(2) == [3, 4]
    with pytest.raises(ValueError, match="2 blocks are wanted, 1 are free"):
        runs.take(2)


def test_several_runs_only_if_no_run_fits() -> None:
    runs = FreeRuns(12)
    runs.take(12)
    runs.add([0, 1, 4, 8, 9, 10])
    assert runs.take(5) == [8, 9, 10, 0, 1]


def test_random_use_never_hands_a_block_out_twice() -> None:
    rng = np.random.default_rng(0)
    runs, held = FreeRuns(200), []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            runs.add(held.pop(int(rng.integers(len(held)))))
        elif len(runs) >= (needed := int(rng.integers(1, 9))):
            held.append(runs.take(needed))
        taken = [block for blocks in held for block in blocks]
        assert len(set(taken)) == len(taken)
        assert len(runs) + len(taken) == 200
    for blocks in held:
        runs.add(blocks)
    assert runs.take(200) == list(range(200)), "neighbours are one run"


@pytest.mark.parametrize("block_tokens", [16, 128])
def test_a_place_in_a_large_cache_is_found_within_a_millisecond(block_tokens: int) -> None:
    """262,144 tokens, 64 live requests with known prefixes, churning: the median, since the machine has other work."""
    import torch

    cache = KVCache([LayerShape(1, 1, 1)], 262144, block_tokens, torch.float32, torch.device("cpu"))
    rng, live, spent_s = np.random.default_rng(0), [], []
    for _ in range(400):
        if len(live) == 64:
            cache.free(live.pop(int(rng.integers(64))))
        prompt = rng.integers(0, 1000, int(rng.integers(100, 4000))).tolist()
        started_s = time.perf_counter()
        sequence = cache.allocate(len(prompt) + 64)
        spent_s.append(time.perf_counter() - started_s)
        assert sequence is not None
        sequence.length = len(prompt)
        cache.remember(sequence, prompt)
        live.append(sequence)
    assert np.median(spent_s) < 1e-3
