"""A verification pass that can be repeated: on our runtime, and on transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench.step.limits import Point
from lm.draft_head import DraftHead
from lm.kv_cache import KVCache, LayerShape
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, choose_tokens
from lm.store import no_progress_bars, resolve_model
from treeline.sampling import SamplingParams
from verifier_svc.service.profile import batch_at

if TYPE_CHECKING:
    from bench.step.bound import Bound

BLOCK_TOKENS = 128
"""Divisible into whole blocks on every device."""


@dataclass(frozen=True)
class Pass:
    """A forward pass and what is done with its logits.

    Attributes:
        forward: gives logits [rows, vocab], one row per new token.
        choose: turns them into token ids on the host.
        reset: forgets the pass, so that the next one finds the same context.
        choose_bound: `choose` with every row bound by a grammar, masks computed anew; None where nothing is bound.
    """

    forward: Callable[[], Tensor]
    choose: Callable[[Tensor], object]
    reset: Callable[[], object]
    choose_bound: Callable[[Tensor], object] | None = None

    def run(self) -> None:
        self.choose(self.forward())


PassMaker = Callable[[Point], Pass]
"""Sets up the context of a point and gives its pass; anything that drafts or verifies can be measured by one."""


def load_transformers(spec: str, like: LanguageModel) -> PreTrainedModel:
    """The same model as transformers runs it: its own modules and sdpa attention, same dtype and device."""
    with no_progress_bars():
        hf: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(spec), dtype=like.dtype, attn_implementation="sdpa", local_files_only=True
        )
    return hf.to(like.device).eval()


def treeline_passes(model: LanguageModel, bound: Bound | None = None) -> PassMaker:
    """Our packed pass: in each sequence a root, and its share of the other tokens as children of the root."""

    def make(point: Point) -> Pass:
        cache, sequences = _packed(model, point)
        rows = [Row(SamplingParams(), point.context)] * point.tokens

        def choose_bound(logits: Tensor) -> object:
            assert bound is not None
            paths = [[], *[[bound.token]] * (_share(point) - 1)] * point.sequences
            masks = [bound.state.allowed(path) for path in paths]
            return choose_tokens(
                logits, [replace(row, allowed=mask) for row, mask in zip(rows, masks, strict=True)]
            ).tolist()

        return Pass(
            lambda: model.forward(sequences, cache),
            lambda logits: choose_tokens(logits, rows).tolist(),
            lambda: cache.commit([(sequence.cache, []) for sequence in sequences]),
            None if bound is None else choose_bound,
        )

    return make


def head_passes(head: DraftHead) -> PassMaker:
    """A draft head's pass over the same trees, on its own output; its best four below each node are chosen."""

    def make(point: Point) -> Pass:
        cache, sequences = _packed(head, point)
        rows = [Row(SamplingParams(), point.context)] * point.tokens
        states = torch.zeros(point.tokens, head.config.hidden_size, dtype=head.dtype, device=head.device)
        return Pass(
            lambda: head.forward(sequences, states, cache)[0],
            lambda logits: head.top_drafts(logits, rows, 4)[0].tolist(),
            lambda: cache.commit([(sequence.cache, []) for sequence in sequences]),
        )

    return make


def transformers_passes(hf: PreTrainedModel, layers: list[LayerShape]) -> PassMaker:
    """transformers' pass: sequences as rows of one batch, each with its tokens as a chain, over a `DynamicCache`.

    A batch of theirs is padded to its longest sequence; here all are equally long, so nothing is lost to padding.
    """

    @torch.inference_mode()
    def make(point: Point) -> Pass:
        cache = DynamicCache()
        for layer, shape in enumerate(layers):
            keys, values = (
                torch.randn(point.sequences, shape.kv_heads, point.context, dim, dtype=hf.dtype, device=hf.device)
                for dim in (shape.key_dim, shape.value_dim)
            )
            cache.update(keys, values, layer)
        ids = torch.ones(point.sequences, _share(point), dtype=torch.int64, device=hf.device)

        @torch.inference_mode()
        def forward() -> Tensor:
            return hf(input_ids=ids, past_key_values=cache, use_cache=True).logits.flatten(0, 1)

        return Pass(forward, lambda logits: logits.argmax(dim=-1).tolist(), lambda: cache.crop(-_share(point)))

    return make


def _share(point: Point) -> int:
    """New tokens of each sequence."""
    share, rest = divmod(point.tokens, point.sequences)
    if share == 0 or rest:
        raise ValueError(f"{point.tokens} tokens do not spread evenly over {point.sequences} sequences")
    return share


@torch.inference_mode()
def _packed(model: LanguageModel | DraftHead, point: Point) -> tuple[KVCache, list[PackedSequence]]:
    """A cache of the point's sequences, their context made of noise: what it holds does not change what it costs."""
    capacity = -(-(point.context + _share(point)) // BLOCK_TOKENS) * BLOCK_TOKENS
    cache = model.new_cache(point.sequences * capacity, "auto")
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return cache, batch_at(cache, point.sequences, point.context, point.tokens)
