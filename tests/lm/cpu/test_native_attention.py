"""The attention kernel against a plain float64 reference, and the bits of its results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lm.attention import AttentionOptions, TreeAttention
from lm.cpu import native_attention
from lm.cpu.grouped_linear import Kernel, kernels
from lm.cpu.native import library
from lm.cpu.native_attention import NativeAttention, attention_for
from lm.kv_cache import KVCache, LayerShape, SequenceCache
from lm.packed import PackedSequence, Span, pack
from tests.lm.helpers import path_to, random_parents

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")

PLAIN = AttentionOptions(scale=0.25, softcap=None, window=None)
OPTIONS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=9),
    "softcap": replace(PLAIN, softcap=1.5),
    "both": replace(PLAIN, window=30, softcap=1.5),
}
SHAPES = {
    "9 on 3": (9, LayerShape(3, 64, 64)),
    "8 on 1": (8, LayerShape(1, 16, 40)),
    "4 on 4": (4, LayerShape(4, 8, 8)),
}


@dataclass
class Case:
    """Sequences with random committed context in a cache, and their new tokens' queries, keys and values."""

    cache: KVCache
    sequences: list[PackedSequence]
    query: Tensor
    key: Tensor
    value: Tensor

    def attend(self, options: AttentionOptions, native: bool = True) -> Tensor:
        """[tokens, heads, value_dim]; leaves the scratch as it was."""
        batch = pack(self.sequences)
        context = attention_for(batch, self.cache) if native else TreeAttention(batch, self.cache)
        assert isinstance(context, NativeAttention) == native
        return context.attend(0, self.query, self.key, self.value, options)


def make(
    spans: list[tuple[int, int, bool]],
    shape: str = "9 on 3",
    seed: int = 0,
    scattered: bool = False,
) -> Case:
    """`spans`: committed tokens, new tokens, and whether these are a random tree."""
    heads, layer = SHAPES[shape]
    rng, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    cache = KVCache([layer], 4 * sum(c + n + 4 for c, n, _ in spans), 4, torch.float32, torch.device("cpu"))
    if scattered:
        held = [cache.allocate(4) for _ in range(cache.total_blocks)]
        for holder in held[:: 2 if seed else -2]:
            assert holder is not None
            cache.free(holder)
    sequences = []
    for committed, new, is_tree in spans:
        sequence = cache.allocate(committed + new)
        assert sequence is not None
        slots = torch.from_numpy(sequence.slots(0, committed))
        for kept in (cache.keys[0], cache.values[0]):
            kept[slots] = torch.randn(committed, *kept.shape[1:], generator=draw)
        sequence.length = committed
        sequences.append(PackedSequence(sequence, [0] * new, random_parents(rng, new) if is_tree else None))
    tokens = sum(new for _, new, _ in spans)
    query = torch.randn(tokens, heads, layer.key_dim, generator=draw)
    key = torch.randn(tokens, layer.kv_heads, layer.key_dim, generator=draw)
    value = torch.randn(tokens, layer.kv_heads, layer.value_dim, generator=draw)
    return Case(cache, sequences, query, key, value)


def reference(case: Case, options: AttentionOptions) -> Tensor:
    """float64, one token at a time, over what it sees, from the definition."""
    rows = []
    for span in pack(case.sequences).spans:
        for token in range(span.stop - span.start):
            rows.append(_attend_alone(case, span, token, options))
    return torch.stack(rows)


def _attend_alone(case: Case, span: Span, token: int, options: AttentionOptions) -> Tensor:
    new, entries = span.visible.shape
    length, depths = span.cache.length, span.depths
    position = length + depths[entries - new + token]
    seen = [*range(length), *(length + np.flatnonzero(span.visible[token]))]
    places = np.concatenate((np.arange(length), length + depths))
    seen = [entry for entry in seen if options.window is None or places[entry] > position - options.window]
    slots = span.cache.slots(0, length + entries)[seen]
    group = case.query.shape[1] // case.key.shape[1]
    keys = case.cache.keys[0][slots].double().repeat_interleave(group, 1)
    values = case.cache.values[0][slots].double().repeat_interleave(group, 1)
    scores = torch.einsum("hd,ehd->he", case.query[span.start + token].double(), keys) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    return torch.einsum("he,ehd->hd", scores.softmax(1), values)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_definition_and_torch(options: AttentionOptions, shape: str, scattered: bool) -> None:
    case = make([(70, 17, True), (0, 1, False), (5, 40, False), (131, 3, True)], shape, 1, scattered)
    output = case.attend(options)
    torch.testing.assert_close(output.double(), reference(case, options), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(output, case.attend(options, native=False), rtol=1e-5, atol=1e-5)


def test_keys_and_values_are_written_to_their_slots_and_nothing_else_is() -> None:
    case = make([(9, 6, True), (3, 5, False)], scattered=True)
    before = case.cache.keys[0].clone(), case.cache.values[0].clone()
    case.attend(PLAIN)
    slots = torch.from_numpy(pack(case.sequences).slots)
    for kept, old, new in zip((case.cache.keys[0], case.cache.values[0]), before, (case.key, case.value), strict=True):
        assert torch.equal(kept[slots], new)
        assert torch.equal(kept.index_fill(0, slots, 0.0), old.index_fill(0, slots, 0.0))


def test_rows_that_lie_apart_are_read_as_such() -> None:
    """As views of one product for query, key and value, and as transformers transposes them."""
    case = make([(20, 5, True)])
    expected = case.attend(PLAIN)
    joined = torch.cat((case.query, case.key, case.value), 1)
    case.query, case.key, case.value = joined.split((9, 3, 3), 1)
    assert torch.equal(case.attend(PLAIN), expected)
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(case.attend(PLAIN), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_token_has_the_same_bits_whatever_else_is_in_the_pass(options: AttentionOptions) -> None:
    spans = [(130, 70, False), (33, 20, True), (200, 1, False)]
    case = make(spans)
    together = case.attend(options)
    start = 0
    for index, (_, new, _) in enumerate(spans):
        place = slice(start, start + new)
        alone = Case(case.cache, [case.sequences[index]], *(t[place] for t in (case.query, case.key, case.value)))
        assert torch.equal(alone.attend(options), together[place])
        start += new


def test_block_layout_leaves_no_trace() -> None:
    spans = [(50, 12, True), (90, 33, False)]
    dense, apart = make(spans, seed=3), make(spans, seed=3, scattered=True)
    assert len(apart.sequences[0].cache.runs(0, 50)) > 1
    assert torch.equal(dense.attend(PLAIN), apart.attend(PLAIN))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_node_of_a_tree_has_the_bits_of_its_path_run_token_by_token(options: AttentionOptions) -> None:
    """So siblings leave no trace, nor does it matter what of the path is committed already."""
    case = make([(45, 24, True)], seed=5)
    whole = case.attend(options)
    tree = case.sequences[0]
    assert tree.parents is not None
    room = case.cache.allocate(45 + 24)
    assert room is not None
    for kept in (case.cache.keys[0], case.cache.values[0]):
        kept[room.slots(0, 45)] = kept[tree.cache.slots(0, 45)]
    for node in range(24):
        room.length = 45
        for step in path_to(tree.parents, node):
            rows = (t[step : step + 1] for t in (case.query, case.key, case.value))
            output = Case(case.cache, [PackedSequence(room, [0])], *rows).attend(options)
            room.length += 1
        assert torch.equal(output[0], whole[node])


def test_the_number_of_threads_leaves_no_trace() -> None:
    case = make([(300, 60, False), (40, 30, True)])
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(case.attend(PLAIN))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_extreme_scores_stay_finite() -> None:
    case = make([(30, 4, False)])
    case.query *= 1e4
    output = case.attend(PLAIN)
    torch.testing.assert_close(output.double(), reference(case, PLAIN), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [LayerShape(2, 8, 12), LayerShape(2, 12, 8)])
def test_sizes_that_are_no_whole_vectors_go_to_torch(layer: LayerShape) -> None:
    cache = KVCache([layer], 16, 4, torch.float32, torch.device("cpu"))
    sequence = cache.allocate(4)
    assert isinstance(sequence, SequenceCache)
    assert isinstance(attention_for(pack([PackedSequence(sequence, [1])]), cache), TreeAttention)


def test_other_types_go_to_torch() -> None:
    cache = KVCache([LayerShape(2, 8, 8)], 16, 4, torch.bfloat16, torch.device("cpu"))
    sequence = cache.allocate(4)
    assert isinstance(sequence, SequenceCache)
    assert isinstance(attention_for(pack([PackedSequence(sequence, [1])]), cache), TreeAttention)


@pytest.mark.skipif(Kernel.FLOAT32_WIDE not in kernels(), reason="no vectors of 16")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_the_width_of_vectors_leaves_no_trace(options, tokens, monkeypatch):
    case = make([(75, tokens, tokens > 1), (0, 3, False)], scattered=True)
    wide = case.attend(options)
    native_attention._layer.cache_clear()
    monkeypatch.setattr(native_attention, "kernels", lambda: (Kernel.FLOAT32,))
    try:
        assert torch.equal(case.attend(options), wide)
    finally:
        native_attention._layer.cache_clear()
