"""How good is a drafter for its target? Drafts, with or without prompt lookup, at every position of its greedy answers.

The text is given throughout: a draft is right if it contains the target's next tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import Prompt
from bench.local_engine import encode
from drafter_svc.drafter import TreeDrafter
from lm.model import LanguageModel
from lm.packed import PackedSequence
from planner.fast.acceptance import Calibrator
from planner.fast.builtin_plan import builtin_plan
from planner.fast.rule import path_acceptance
from planner.policies import parse_policy
from planner.policies.base import places_by_score
from treeline.config import LimitsConfig
from treeline.drafting import NO_FEATURES, DraftRequest, DraftSequence
from treeline.forest import ROOT, Forest
from treeline.sampling import SamplingParams
from treeline.step_record import NodeOutcomes
from verifier_svc.engine.walk import Walk, observed, target_walks
from verifier_svc.speculation.hidden_states import WINDOW_TOKENS
from verifier_svc.speculation.prompt_lookup import Allowance, PromptLookup

TOP = "static:4"
POLICIES = {"chain:5": "chain:5", "tree:16": "eagle2:6,4,16"}
"""The reported accepted lengths by name, and the policies that draft for them."""
MAX_NODES, MAX_DEPTH = 64, 8
BINS = 10
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """The target's greedy answer.

    Attributes:
        token_ids: prompt and answer.
        features: uint16 [tokens - 1, width], bits of bfloat16 of all tokens but the last; None if nobody reads them.
    """

    category: str
    prompt_tokens: int
    token_ids: list[int]
    features: NDArray[np.uint16] | None


@dataclass
class Tally:
    """Counts over some answers.

    Attributes:
        positions, top1, top4: positions drafted, and those whose next token was first, or among four.
        steps, emitted: of the walk through the answers, by name of POLICIES.
        reached, continued: parents reached at each depth, and those with an accepted child, in trees of 16.
        outcomes: of every child of a reached node, in trees of 16.
    """

    positions: int = 0
    top1: int = 0
    top4: int = 0
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    emitted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    reached: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    continued: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    outcomes: list[NodeOutcomes] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "top1": self.top1 / max(1, self.positions),
            "top4": self.top4 / max(1, self.positions),
            "accepted_length": {name: self.emitted[name] / max(1, self.steps[name]) for name in POLICIES},
            "acceptance_by_depth": {
                str(depth): self.continued[depth] / reached for depth, reached in sorted(self.reached.items())
            },
            **reliability(self.outcomes),
        }


def reliability(outcomes: list[NodeOutcomes]) -> dict[str, Any]:
    """Acceptance by bin of the drafter's own probability, and the expected calibration error."""
    seen = [NodeOutcomes.empty(), *outcomes]
    probs = np.concatenate([one.draft_probs for one in seen])
    accepted = np.concatenate([one.accepted for one in seen])
    bins = np.minimum((probs * BINS).astype(int), BINS - 1)
    rows = []
    for index in np.unique(bins).tolist():
        inside = bins == index
        rows.append((float(probs[inside].mean()), float(accepted[inside].mean()), int(inside.sum())))
    error = sum(nodes * abs(probability - share) for probability, share, nodes in rows) / max(1, len(probs))
    named = [{"probability": probability, "accepted": share, "nodes": nodes} for probability, share, nodes in rows]
    return {"reliability": named, "ece": error}


class DrafterTrial:
    """One drafter, tried on answers; its calibration is learnt as it goes, as in service.

    Attributes:
        plan: the built-in one, with the calibration of its last walk.
        tallies: by category, and of all under "".
        calibrator: of this drafter.
    """

    def __init__(self, drafter: TreeDrafter, looks_up: bool) -> None:
        """`looks_up`: graft continuations from the text itself, as the verifier does."""
        limits = LimitsConfig(max_tree_nodes=MAX_NODES, max_tree_depth=MAX_DEPTH)
        self.plan = builtin_plan(limits)
        self.drafter = drafter
        self.lookup = PromptLookup() if looks_up else None
        self.calibrator = Calibrator()
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self._session_id = 0

    def run(self, answer: Answer) -> None:
        tallies = (self.tallies[""], self.tallies[answer.category])
        self._top(answer, tallies)
        for name, policy in POLICIES.items():
            self._walk(answer, name, policy, tallies)

    def _top(self, answer: Answer, tallies: tuple[Tally, ...]) -> None:
        session = _Session(self, answer, TOP)
        for root in range(answer.prompt_tokens, len(answer.token_ids) - 1):
            tree, worth = session.draft(root)
            choices = tree.token_ids[np.argsort(-worth, kind="stable")]
            found = np.flatnonzero(choices == answer.token_ids[root + 1])
            place = int(found[0]) if len(found) else BINS
            for tally in tallies:
                tally.positions += 1
                tally.top1 += place == 0
                tally.top4 += place < 4
        session.close()

    def _walk(self, answer: Answer, name: str, policy: str, tallies: tuple[Tally, ...]) -> None:
        session, root = _Session(self, answer, policy), answer.prompt_tokens
        while root < len(answer.token_ids) - 1:
            tree, worth = session.draft(root)
            tree = tree.select(_best_chain(tree, worth, 5) if name == "chain:5" else _best(tree, worth, 16))
            walk = _forced_walk(tree, answer.token_ids[root + 1 :])
            outcomes = observed(tree, np.ones(len(tree.token_ids), np.bool_), [walk], [False])
            self.calibrator.update(outcomes)
            self.plan = replace(self.plan, calibration=self.calibrator.calibration())
            for tally in tallies:
                tally.steps[name] += 1
                tally.emitted[name] += len(walk.tokens)
                if name == "tree:16":
                    _count(tally, tree, walk, outcomes)
            root += len(walk.tokens)
        session.close()

    def next_session_id(self) -> int:
        self._session_id += 1
        return self._session_id


class _Session:
    """One answer told to the drafter token by token."""

    def __init__(self, trial: DrafterTrial, answer: Answer, policy: str) -> None:
        self._trial, self._answer, self._policy = trial, answer, policy
        self._id = trial.next_session_id()
        self._told = 0

    def draft(self, root: int) -> tuple[Forest, NDArray[np.float32]]:
        """The tree below the token at index `root`; and float32 [n], the calibrated path acceptance of its nodes."""
        answer, features, trial = self._answer, NO_FEATURES, self._trial
        if answer.features is not None:
            features = answer.features[max(0, self._told - 1, root - WINDOW_TOKENS) : root]
        sequence = DraftSequence(
            self._id, self._told, answer.token_ids[self._told : root + 1], SamplingParams(), self._policy, MAX_NODES,
            MAX_DEPTH, features=features,
        )  # fmt: skip
        forest = trial.drafter.draft(DraftRequest(root, trial.plan, [sequence])).forest
        self._told = root + 1
        if trial.lookup is not None:
            trial.lookup.read(self._id, answer.token_ids[: root + 1])
            allowance = Allowance(self._id, False, MAX_NODES, parse_policy(self._policy).max_depth)
            forest = trial.lookup.graft(forest, [allowance], trial.plan.calibration)
        return forest, path_acceptance(forest, np.zeros(1, np.bool_), trial.plan.calibration)

    def close(self) -> None:
        self._trial.drafter.release([self._id])
        if self._trial.lookup is not None:
            self._trial.lookup.forget(self._id)


def _best(tree: Forest, worth: NDArray[np.float32], nodes: int) -> NDArray[np.bool_]:
    """bool [n]: the `nodes` nodes of the tree that are worth most."""
    return places_by_score(worth, tree.tree_of) < nodes


def _best_chain(tree: Forest, worth: NDArray[np.float32], length: int) -> NDArray[np.bool_]:
    """bool [n]: the best child of the root, its best child, and so on."""
    kept, at = np.zeros(len(worth), np.bool_), ROOT
    for _ in range(length):
        children = np.flatnonzero(tree.parents == at)
        if not len(children):
            break
        at = int(children[worth[children].argmax()])
        kept[at] = True
    return kept


def _forced_walk(tree: Forest, following: list[int]) -> Walk:
    """The target's walk if its next tokens are `following`; it ends where they end."""
    depths = tree.depths
    own = [following[depth] if depth < len(following) else -1 for depth in (0, *depths.tolist())]
    (walk,) = target_walks(tree, own)
    return Walk(walk.accepted, [token for token in walk.tokens if token >= 0])


def _count(tally: Tally, tree: Forest, walk: Walk, outcomes: NodeOutcomes) -> None:
    deepest = len(walk.accepted)
    for depth in set(outcomes.depths.tolist()):
        tally.reached[depth] += 1
        tally.continued[depth] += depth <= deepest
    tally.outcomes.append(outcomes)


class AnswerWriter:
    """Lets the target answer greedily, token by token, and keeps the features that a head would read."""

    def __init__(self, model: LanguageModel, layers: tuple[int, ...] | None, max_tokens: int) -> None:
        """`layers`: what the head reads besides the final states; None keeps nothing."""
        self._model, self._max_tokens = model, max_tokens
        self._tap = model.tap(layers) if layers is not None else None

    def answer(self, prompt: Prompt) -> Answer:
        token_ids = encode(self._model.tokenizer, prompt)
        prompt_tokens = len(token_ids)
        cache = self._model.new_cache(prompt_tokens + self._max_tokens + BLOCK_TOKENS, BLOCK_TOKENS)
        kv = cache.allocate(prompt_tokens + self._max_tokens)
        assert kv is not None
        new, features = list(token_ids), []
        while len(token_ids) < prompt_tokens + self._max_tokens:
            logits = self._model.forward([PackedSequence(kv, new, logits="last")], cache)
            cache.commit([(kv, list(range(len(new))))])
            if self._tap is not None:
                features.append(self._tap.take().to("cpu", torch.bfloat16))
            new = [int(logits[0].argmax())]
            token_ids += new
            if new[0] in self._model.eos_token_ids:
                break
        bits = torch.cat(features).view(torch.int16).numpy().view(np.uint16) if features else None
        return Answer(prompt.category, prompt_tokens, token_ids, bits)
