"""Small doubles and shorthands for the drafters' tests."""

from __future__ import annotations

from copy import deepcopy

import numpy as np

from drafter_svc.growth import grow
from drafter_svc.proposer import Children, Frontier, Proposer, Root
from drafter_svc.sessions import Session, SessionMemory
from lm.model import LanguageModel
from planner.policies import parse_policy
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.drafting import DraftReply, DraftRequest, DraftSequence
from treeline.forest import Forest, Source
from treeline.plan import DEPTHS, PROB_BINS, SOURCES, Calibration, CostCurve, CostModel, PaperFit, Plan
from treeline.sampling import SamplingParams

GREEDY = SamplingParams()
PAPER = PaperFit(lambda_s=0.0, gamma_s=0.03, delta=1.0, rho=0.1)


def plan(price: float = 0.0, layer_s: float = 0.0, acceptance: np.ndarray | None = None) -> Plan:
    """A plan under which nothing costs anything unless said otherwise; acceptance grows with the probability."""
    if acceptance is None:
        acceptance = np.broadcast_to(np.linspace(0.03, 0.97, PROB_BINS), (SOURCES, 2, DEPTHS, PROB_BINS))
    return Plan(
        version=7,
        created_unix_s=0.0,
        lifetime_s=1e9,
        cost=CostModel((CostCurve(1, 64, (1, 256), (1e-3, 1e-3)),), draft_layer_s=layer_s, paper=PAPER),
        calibration=Calibration(np.asarray(acceptance, np.float32), np.ones((2, DEPTHS), np.float32)),
        price=price,
        max_nodes=64,
        max_depth=8,
    )


def sequence(
    policy: str, tokens: list[int], max_nodes: int = 32, sampling: SamplingParams = GREEDY, session_id: int = 1, **more
) -> DraftSequence:
    """A whole sequence, from its first token."""
    given = {"start": 0, "max_depth": 8} | more
    return DraftSequence(session_id, given.pop("start"), tokens, sampling, policy, max_nodes, **given)


def grown(model: Proposer, session: Session, wanted: DraftSequence, a_plan: Plan | None = None) -> Forest:
    """The tree of one session."""
    model.begin([session], SessionMemory(1, None))
    return grow([Root(session, wanted, parse_policy(wanted.policy))], a_plan or plan(), model)


def tiny_language_model(seed: int = 0) -> LanguageModel:
    """A model of its own, so that replacing its attention touches no other one's configuration."""
    return LanguageModel.from_hf(deepcopy(tiny_llama(seed)), tiny_tokenizer())


class ScriptedProposer:
    """Proposes what a table from paths of tokens to [(token, probability)] says, and records what it was asked."""

    def __init__(self, table: dict[tuple[int, ...], list[tuple[int, float]]], source: Source = Source.MODEL) -> None:
        self.source = source
        self.table = table
        self.asked: list[list[tuple[int, ...]]] = []

    def begin(self, sessions: list[Session], memory: SessionMemory) -> None:
        self.asked = []

    def propose(self, roots: list[Root], frontier: Frontier) -> Children:
        if not frontier.depth:
            self._paths = [()] * len(frontier.tree_of)
        else:
            above = [self._paths[place] for place in frontier.above.tolist()]
            self._paths = [(*path, token) for path, token in zip(above, frontier.token_ids.tolist(), strict=True)]
        self.asked.append(list(self._paths))
        rows = [
            (node, token, prob, rank)
            for node, (tree, path) in enumerate(zip(frontier.tree_of.tolist(), self._paths, strict=True))
            for rank, (token, prob) in enumerate(self.choices(roots[tree], path)[: roots[tree].policy.max_children])
        ]
        if not rows:
            return Children.none()
        columns = zip(zip(*rows, strict=True), (np.intp, np.int32, np.float32, np.uint8), strict=True)
        return Children(*(np.asarray(column, dtype) for column, dtype in columns))

    def choices(self, root: Root, path: tuple[int, ...]) -> list[tuple[int, float]]:
        return self.table.get(path, [])


def trees_of(request: DraftRequest, reply: DraftReply) -> dict[int, Forest]:
    """By session, the trees of all that were drafted."""
    trees = {s.session_id: reply.forest.tree(place) for place, s in enumerate(request.sequences)}
    return {session_id: tree for session_id, tree in trees.items() if session_id not in reply.held}


def tree_paths(tree: Forest) -> list[tuple[int, ...]]:
    """Every node, in order, as the tokens that lead to it."""
    found: list[tuple[int, ...]] = []
    for token_id, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token_id,))
    return found


def paths(tree: Forest) -> set[tuple[int, ...]]:
    return set(tree_paths(tree))
