"""The drafter: sessions, proposers and the growth loop behind one batched call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from drafter_svc.growth import GrowingTree, grow
from drafter_svc.model_proposer import ModelProposer
from drafter_svc.ngram import NgramProposer
from drafter_svc.proposer import Proposer
from drafter_svc.sessions import SessionStore
from lm.model import LanguageModel
from lm.store import vocabulary_sha256 as sha256_of
from planner.policies import parse_policy
from treeline.config import DrafterConfig, LimitsConfig
from treeline.drafting import DraftReply, DraftRequest, DraftStats
from treeline.errors import ConfigError
from treeline.plan import Plan
from treeline.tree import DraftTree

KV_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class DrafterInfo:
    """What a drafter is.

    Attributes:
        name: "ngram", the draft model's name, or both joined by "+".
        vocab_size: of the draft model; 0 if there is none.
        vocabulary_sha256: of the draft model's tokenizer; empty if there is none.
        layer_s, node_s: measured seconds of a draft-model layer and of each node in it; 0 without a model.
    """

    name: str
    vocab_size: int = 0
    vocabulary_sha256: str = ""
    layer_s: float = 0.0
    node_s: float = 0.0


class TreeDrafter:
    """Grows one tree per request from a draft model, from n-gram lookup, or from both.

    Attributes:
        info: what this drafter is.
    """

    def __init__(
        self,
        info: DrafterInfo,
        max_sessions: int,
        plan: Callable[[], Plan],
        lookups: list[Proposer],
        model: ModelProposer | None = None,
    ) -> None:
        self.info = info
        self._plan = plan
        self._sessions = SessionStore(max_sessions)
        self._lookups = lookups
        self._model = model

    @property
    def session_ids(self) -> list[int]:
        """Sessions held, in no order."""
        return list(self._sessions)

    def draft(self, request: DraftRequest) -> DraftReply:
        """Release, catch up and draft.

        Raises:
            ValueError: a policy's spelling is not understood; nothing was drafted.
        """
        started_s = time.perf_counter()
        policies = [parse_policy(sequence.policy) for sequence in request.sequences]
        plan = self._plan()
        for session_id in request.released:
            self._release(session_id)
        admitted, held, evicted = self._sessions.admit(request.sequences)
        for session_id in evicted:
            self._release(session_id)
        for proposer in self._proposers:
            proposer.begin(list(admitted.values()))
        trees = {
            sequence.session_id: GrowingTree(admitted[sequence.session_id], sequence, policy)
            for sequence, policy in zip(request.sequences, policies, strict=True)
            if sequence.session_id in admitted
        }
        grow(list(trees.values()), plan, self._lookups, self._model)
        finished: dict[int, DraftTree] = {session_id: tree.finish() for session_id, tree in trees.items()}
        return DraftReply(request.step_id, finished, held, self._stats(started_s, plan))

    def close(self) -> None:
        for session_id in self.session_ids:
            self._release(session_id)

    @property
    def _proposers(self) -> list[Proposer]:
        return [*self._lookups, self._model] if self._model else self._lookups

    def _release(self, session_id: int) -> None:
        self._sessions.release(session_id)
        for proposer in self._proposers:
            proposer.release(session_id)

    def _stats(self, started_s: float, plan: Plan) -> DraftStats:
        draft_s = time.perf_counter() - started_s
        if self._model is None:
            return DraftStats(draft_s, plan_version=plan.version)
        layers = self._model.stats
        return DraftStats(draft_s, tuple(layers.nodes), layers.catch_up_tokens, plan.version, tuple(layers.seconds))


def build_drafter(
    config: DrafterConfig, limits: LimitsConfig, plan: Callable[[], Plan], vocabulary_sha256: str | None
) -> TreeDrafter:
    """The drafter that `config` describes, its model loaded and measured.

    Args:
        plan: the current plan, asked once per step.
        vocabulary_sha256: the target's; None leaves the comparison to the verifier.

    Raises:
        ConfigError: the draft model cannot be loaded, or does not share the target's vocabulary.
    """
    lookups: list[Proposer] = [NgramProposer()] if "ngram" in config.kind else []
    if config.kind == "ngram":
        return TreeDrafter(DrafterInfo("ngram"), config.max_sessions, plan, lookups)
    assert config.model is not None
    model = LanguageModel.load(config.model)
    assert model.tokenizer is not None
    sha256 = sha256_of(model.tokenizer)
    if vocabulary_sha256 is not None and sha256 != vocabulary_sha256:
        raise ConfigError(
            f"the draft model {model.name} has another vocabulary (sha256 {sha256[:12]}) "
            f"than the target (sha256 {vocabulary_sha256[:12]}); a drafter needs the target's tokenizer"
        )
    cache = model.new_cache(config.kv_cache_tokens, KV_BLOCK_TOKENS)
    proposer = ModelProposer(model, cache, limits.max_tree_nodes)
    name = f"{model.name}+ngram" if lookups else model.name
    info = DrafterInfo(name, model.vocab_size, sha256, *proposer.measure())
    return TreeDrafter(info, config.max_sessions, plan, lookups, proposer)
