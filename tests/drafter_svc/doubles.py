"""Small doubles and shorthands for the drafters' tests."""

from __future__ import annotations

from copy import deepcopy

import numpy as np

from drafter_svc.growth import grow
from drafter_svc.proposer import Children, GrowingTree, Proposer
from drafter_svc.sessions import Session
from lm.model import LanguageModel
from planner.policies import parse_policy
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from treeline.drafting import DraftSequence
from treeline.plan import DEPTHS, PROB_BINS, SOURCES, Calibration, CostCurve, CostModel, PaperFit, Plan
from treeline.sampling import SamplingParams
from treeline.tree import DraftTree, Source

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


def grown(
    lookup: Proposer | None,
    model: Proposer | None,
    session: Session,
    wanted: DraftSequence,
    a_plan: Plan | None = None,
) -> DraftTree:
    """The tree of one session."""
    for proposer in (lookup, model):
        if proposer:
            proposer.begin([session])
    tree = GrowingTree(session, wanted, parse_policy(wanted.policy))
    return grow([tree], a_plan or plan(), [lookup] if lookup else [], model)[0]


def tiny_language_model(seed: int = 0) -> LanguageModel:
    """A model of its own, so that replacing its attention touches no other one's configuration."""
    return LanguageModel.from_hf(deepcopy(tiny_llama(seed)), tiny_tokenizer())


class ScriptedProposer:
    """Proposes what a table from paths of tokens to [(token, probability)] says, and records what it was asked."""

    def __init__(self, table: dict[tuple[int, ...], list[tuple[int, float]]], source: Source = Source.MODEL) -> None:
        self.source = source
        self.table = table
        self.asked: list[list[tuple[int, ...]]] = []

    def begin(self, sessions: list[Session]) -> None:
        self.asked = []

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        self.asked.append([])
        return [self._children(tree, nodes) for tree, nodes in wanted]

    def release(self, session_id: int) -> None:
        pass

    def _children(self, tree: GrowingTree, nodes: list[int]) -> Children:
        children = Children()
        for node in nodes:
            path = tuple(tree.token_ids[n] for n in tree.path(node))
            self.asked[-1].append(path)
            for rank, (token_id, prob) in enumerate(self.table.get(path, [])[: tree.policy.max_children]):
                children.parents.append(node)
                children.token_ids.append(token_id)
                children.probs.append(prob)
                children.ranks.append(rank)
        return children


def tree_paths(tree: DraftTree) -> list[tuple[int, ...]]:
    """Every node, in order, as the tokens that lead to it."""
    found: list[tuple[int, ...]] = []
    for token_id, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append(((*found[parent],) if parent >= 0 else ()) + (token_id,))
    return found


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return set(tree_paths(tree))
