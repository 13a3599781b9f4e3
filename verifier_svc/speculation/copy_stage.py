"""What a step can have without the drafter: for requests whose text repeats itself, more of the same, where it pays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from planner.fast.acceptance import accepts
from planner.fast.cost import pass_s
from planner.fast.rule import BatchState, least_gain
from treeline.forest import Forest
from treeline.plan import Plan
from treeline.tree import DraftTree, Source
from verifier_svc.engine.sequence import Sequence, weights_of
from verifier_svc.speculation.drafts import Drafts, pruned
from verifier_svc.speculation.prompt_lookup import Copying

MARGIN = 0.02
"""A copy must bring this share more than plain decoding: to walk and to commit a tree takes some of a step as well."""


class CopyStage:
    """Copies for those whose drafting has a price."""

    def __init__(self) -> None:
        self._copying = Copying()
        self._batch: tuple[float, ...] = ()
        self._least_gain = 0.0

    def run(
        self, decoding: list[Sequence], longest: Callable[[Sequence], int], state: BatchState, plan: Plan, now_s: float
    ) -> Drafts | None:
        """Copies that pay, if there are any. `longest`: of a request's copy, in nodes."""
        if not any(s.policy.priced for s in decoding):
            return None
        weights, least = weights_of(decoding, now_s), self._least(len(decoding), state, plan)
        factors = [weights[s.session_id] * s.acceptance.ratio if s.policy.priced else 0.0 for s in decoding]
        if max(factors) < least:
            return None
        sure = [
            self._copying.read(s.session_id, s.token_ids) if f else 0.0 for s, f in zip(decoding, factors, strict=True)
        ]
        if not any(sure) or (_accepted(decoding, sure, plan) * factors).max() < least:
            return None
        trees = [
            self._copying.chain(s.session_id, s.token_ids, longest(s)) if p else DraftTree.empty()
            for s, p in zip(decoding, sure, strict=True)
        ]
        copied = {s.session_id for s, tree in zip(decoding, trees, strict=True) if len(tree)}
        drafts = pruned(decoding, Forest.of(trees), copied, weights, state, plan)
        assert drafts.pruning is not None
        plain_s = pass_s(plan.cost, len(decoding), state.context_tokens, state.base_tokens)
        gain = drafts.pruning.expected_tokens - len(decoding)
        pays = gain - drafts.pruning.price * (drafts.predicted_verify_s - plain_s) > MARGIN * len(decoding)
        return drafts if pays else None

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._copying.forget(sequence.session_id)

    def _least(self, sequences: int, state: BatchState, plan: Plan) -> float:
        """What no copy pays without, as it was when last asked if only more context came since."""
        batch = (plan.version, sequences, *state._replace(context_tokens=0))
        if batch != self._batch:
            self._batch = batch
            self._least_gain = least_gain(sequences * plan.max_nodes, MARGIN * sequences, sequences, state, plan)
        return self._least_gain


def _accepted(decoding: list[Sequence], sure: list[float], plan: Plan) -> NDArray[np.float32]:
    """float32 [n]: acceptance of each copy's first node, which gains most; 0 without one."""
    sources = np.full(len(decoding), Source.NGRAM, np.uint8)
    sampled = np.asarray([not s.request.sampling.greedy for s in decoding])
    probs = np.asarray(sure, np.float32)
    return accepts(plan.calibration, sources, np.asarray(1), probs, sampled) * (probs > 0)
