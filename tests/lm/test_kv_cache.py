"""The block cache: who holds which slots, and what commit moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.kv_cache import KVCache, LayerShape, SequenceCache

PLAIN = [LayerShape(2, 4, 4)] * 3
MIXED = [LayerShape(2, 4, 4), LayerShape(1, 8, 6), LayerShape(2, 4, 4)]


def new_cache(tokens: int = 64, block_tokens: int = 4, layers: list[LayerShape] = PLAIN) -> KVCache:
    return KVCache(layers, tokens, block_tokens, torch.float32, torch.device("cpu"))


def allocated(cache: KVCache, tokens: int) -> SequenceCache:
    sequence = cache.allocate(tokens)
    assert sequence is not None
    return sequence


def fill(cache: KVCache, sequence: SequenceCache, scratch: int) -> None:
    """Pretend that a pass wrote `scratch` entries: entry i of the sequence holds 100 * layer + i."""
    slots = torch.from_numpy(sequence.slots(sequence.length, sequence.length + scratch))
    numbers = torch.arange(sequence.length, sequence.length + scratch, dtype=torch.float32)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        keys[slots] = (100 * layer + numbers)[:, None, None].expand(-1, *keys.shape[1:])
        values[slots] = -(100 * layer + numbers)[:, None, None].expand(-1, *values.shape[1:])
    sequence.scratch = scratch


def held(cache: KVCache, sequence: SequenceCache, layer: int) -> list[float]:
    """Key numbers of the committed entries; checks that the values moved alike."""
    slots = torch.from_numpy(sequence.slots(0, sequence.length))
    keys = cache.keys[layer][slots]
    assert torch.equal(keys[:, 0, 0], -cache.values[layer][slots][:, 0, 0])
    assert (keys == keys[:, :1, :1]).all()
    return keys[:, 0, 0].tolist()


def test_tokens_are_rounded_up_to_blocks_and_none_when_full() -> None:
    cache = new_cache(tokens=18)
    assert (cache.total_blocks, cache.block_tokens) == (4, 4)
    first = allocated(cache, 9)
    assert (first.capacity, cache.used_blocks, cache.free_blocks) == (12, 3, 1)
    assert cache.allocate(5) is None
    assert cache.free_blocks == 1
    allocated(cache, 4)
    assert cache.allocate(1) is None


def test_the_tightest_run_is_taken_and_several_only_if_it_must() -> None:
    cache = new_cache(tokens=40)  # 10 blocks
    a, b, c, d = (allocated(cache, 4 * blocks) for blocks in (3, 1, 2, 4))
    assert d.runs(0, 16) == [slice(24, 40)]
    cache.free(a)
    cache.free(c)  # Free: 0-2 and 4-5.
    e = allocated(cache, 8)
    assert e.blocks == [4, 5]
    cache.free(b)
    cache.free(e)  # Free: 0-5, one run again.
    assert allocated(cache, 24).runs(0, 24) == [slice(0, 24)]
    cache.free(d)
    rest = new_cache(tokens=40)
    holders = [allocated(rest, 4) for _ in range(10)]
    for index in (0, 3, 4, 8):
        rest.free(holders[index])
    scattered = allocated(rest, 16)
    assert sorted(scattered.blocks) == [0, 3, 4, 8]
    assert scattered.blocks[:2] == [3, 4]
    assert len(scattered.runs(0, 16)) == 3
    assert scattered.runs(6, 10) == [slice(18, 20), slice(scattered.blocks[2] * 4, scattered.blocks[2] * 4 + 2)]


@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_leaks_and_never_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = new_cache(tokens=120, block_tokens=int(rng.integers(1, 7)))
    alive: list[SequenceCache] = []
    for _ in range(400):
        choice = rng.random()
        if alive and choice < 0.35:
            cache.free(alive.pop(int(rng.integers(len(alive)))))
        elif alive and choice < 0.6:
            sequence, tokens = alive[int(rng.integers(len(alive)))], int(rng.integers(0, 60))
            first, free = list(sequence.blocks), cache.free_blocks
            assert cache.extend(sequence, tokens) == (-(-tokens // cache.block_tokens) - len(first) <= free)
            assert sequence.blocks[: len(first)] == first
        elif alive and choice < 0.7:
            sequence, tokens = alive[int(rng.integers(len(alive)))], int(rng.integers(0, 40))
            cache.shrink(sequence, tokens)
            assert sequence.capacity <= -(-tokens // cache.block_tokens) * cache.block_tokens
        else:
            tokens, free = int(rng.integers(0, 40)), cache.free_blocks
            sequence = cache.allocate(tokens)
            assert (sequence is None) == (-(-tokens // cache.block_tokens) > free)
            if sequence is not None:
                assert sequence.capacity >= tokens
                alive.append(sequence)
        blocks = [block for sequence in alive for block in sequence.blocks]
        assert len(blocks) == len(set(blocks)) == cache.used_blocks == cache.total_blocks - cache.free_blocks
    for sequence in alive:
        cache.free(sequence)
    assert cache.used_blocks == 0
    assert allocated(cache, cache.total_blocks * cache.block_tokens).runs(0, 1) == [slice(0, 1)]


def test_a_sequence_grows_in_place_where_it_can_and_keeps_what_it_committed() -> None:
    cache = new_cache(tokens=40)
    first, second = allocated(cache, 4), allocated(cache, 4)
    fill(cache, second, 4)
    cache.commit([(second, [0, 1, 2, 3])])
    assert cache.extend(second, 10)
    assert second.blocks == [1, 2, 3]
    assert cache.extend(first, 8)
    assert first.blocks == [0, 4]
    cache.shrink(second, 0)
    assert second.blocks == [1], "what is committed stays"
    assert held(cache, second, 1) == [100, 101, 102, 103]
    assert not cache.extend(second, 4 * 9)
    assert second.blocks == [1]
    assert cache.free_blocks == 7


def test_freeing_twice_is_harmless_and_a_freed_sequence_holds_nothing() -> None:
    cache = new_cache()
    first, second = allocated(cache, 8), allocated(cache, 8)
    cache.free(first)
    third = allocated(cache, 8)
    cache.free(first)
    assert cache.used_blocks == 4
    assert set(second.blocks).isdisjoint(third.blocks)
    assert (first.capacity, first.length, first.scratch) == (0, 0, 0)
    with pytest.raises(ValueError, match="exceed"):
        first.slots(0, 1)


@pytest.mark.parametrize("layers", [PLAIN, MIXED], ids=["plain", "mixed"])
def test_commit_keeps_the_path_of_every_sequence_in_every_layer(layers: list[LayerShape]) -> None:
    cache = new_cache(layers=layers)
    sequences = [allocated(cache, 14) for _ in range(3)]
    for sequence, committed in zip(sequences, (2, 0, 5), strict=True):
        fill(cache, sequence, committed)
    cache.commit([(s, list(range(s.scratch))) for s in sequences])
    for sequence in sequences:
        fill(cache, sequence, 8)
    cache.commit([(sequences[0], [0, 3, 4, 7]), (sequences[1], []), (sequences[2], [1])])
    for layer in range(3):
        assert held(cache, sequences[0], layer) == [100 * layer + i for i in (0, 1, 2, 5, 6, 9)]
        assert held(cache, sequences[1], layer) == []
        assert held(cache, sequences[2], layer) == [100 * layer + i for i in (0, 1, 2, 3, 4, 6)]
    assert all(s.scratch == 0 for s in sequences)


@pytest.mark.parametrize("kept", [[3], [-1], [1, 1], [2, 1]])
def test_commit_refuses_what_is_no_path_of_the_scratch(kept: list[int]) -> None:
    cache = new_cache()
    sequence = allocated(cache, 8)
    fill(cache, sequence, 3)
    with pytest.raises(ValueError, match="scratch"):
        cache.commit([(sequence, kept)])


def test_truncate_drops_the_end_and_the_scratch_and_cannot_lengthen() -> None:
    cache = new_cache()
    sequence = allocated(cache, 8)
    fill(cache, sequence, 6)
    cache.commit([(sequence, list(range(6)))])
    sequence.scratch = 2
    sequence.truncate(4)
    assert (sequence.length, sequence.scratch) == (4, 0)
    with pytest.raises(ValueError, match="truncate"):
        sequence.truncate(5)
