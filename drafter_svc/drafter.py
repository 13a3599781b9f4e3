"""The drafter: sessions, draft model and growth loop behind one batched call."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from drafter_svc.growth import grow
from drafter_svc.head_proposer import HeadProposer
from drafter_svc.layered_proposer import LayeredProposer
from drafter_svc.proposer import Proposer, Root
from drafter_svc.sessions import SessionMemory
from lm.cuda.graphs import How
from lm.draft_head import DraftHead
from lm.store import DEFAULT_NAME, resolve_head
from lm.store import vocabulary_sha256 as sha256_of
from planner.policies import parse_policy
from treeline.config import DEFAULT_MODEL, DrafterConfig, LimitsConfig, ModelConfig
from treeline.drafting import NO_FEATURES, DraftReply, DraftRequest, DraftSequence, DraftStats, FeatureSpec
from treeline.errors import ConfigError
from treeline.forest import Forest
from treeline.plan import Plan
from treeline.sampling import SamplingParams

WARM_UP_BATCHES = (1, 4, 8, 8)
"""Requests of each warm-up draft. The last size runs twice: its first run still meets new shapes."""
WARM_UP_TOKENS, WARM_UP_NODES = 16, 8
"""A short prompt and the built-in plan's tree: enough to run every kind of pass once."""
DEFAULT_HEAD = Path(__file__).parent / "heads" / DEFAULT_NAME
"""The head of the default target."""


@dataclass(frozen=True)
class DrafterInfo:
    """The draft model or head of a drafter.

    Attributes:
        name: "none" if there is neither model nor head.
        vocab_size: 0 if there is neither.
        vocabulary_sha256: of the tokenizer; empty if there is none.
        layer_s, node_s: measured seconds of a layer, and of each node in it; 0 if there is neither.
        features: what a head reads of the target.
    """

    name: str
    vocab_size: int = 0
    vocabulary_sha256: str = ""
    layer_s: float = 0.0
    node_s: float = 0.0
    features: FeatureSpec | None = None


class TreeDrafter:
    """Grows one tree per request from a draft model or head.

    Attributes:
        info: its model or head.
    """

    def __init__(self, info: DrafterInfo, max_sessions: int, proposer: Proposer | None) -> None:
        """`proposer`: None grows no trees: the verifier's prompt lookup drafts alone."""
        self.info = info
        self._proposer = proposer
        self._model = proposer if isinstance(proposer, LayeredProposer) else None
        self._memory = SessionMemory(max_sessions, self._model.cache if self._model else None)

    @property
    def features(self) -> FeatureSpec | None:
        return self.info.features

    @property
    def sessions(self) -> int:
        """Number of sessions held."""
        return len(self._memory)

    @property
    def passes(self) -> Counter[How]:
        """Passes of its model or head so far, by how they ran."""
        return self._model.passes.counts if self._model else Counter()

    def draft(self, request: DraftRequest, verifier: int = 0) -> DraftReply:
        """Release sessions, catch up with new tokens, and draft. `verifier`: the owner of the session ids.

        Raises:
            ValueError: unknown policy; nothing was drafted.
        """
        started_s = time.perf_counter()
        policies = [parse_policy(sequence.policy) for sequence in request.sequences]
        self.release(request.released, verifier)
        sessions, held = self._memory.admit(verifier, request.sequences)
        forest = Forest.empty(len(sessions))
        if self._proposer is not None:
            places = [place for place, session in enumerate(sessions) if session is not None]
            roots = [
                Root(session, sequence, policy)
                for session, sequence, policy in zip(sessions, request.sequences, policies, strict=True)
                if session is not None
            ]
            self._proposer.begin([root.session for root in roots], self._memory)
            forest = grow(roots, request.plan, self._proposer).spread(places, len(sessions))
        return DraftReply(request.step_id, forest, held, self._stats(started_s))

    def release(self, session_ids: list[int], verifier: int = 0) -> None:
        """Drop these sessions."""
        self._memory.release([(verifier, session_id) for session_id in session_ids])

    def release_verifier(self, verifier: int) -> None:
        """Drop all sessions of a verifier."""
        self._memory.release([key for key in self._memory if key[0] == verifier])

    def warm_up(self, plan: Plan) -> None:
        """Draft for batches of several sizes: first calls take many times as long, and no step should wait for them."""
        sessions = [-1 - i for i in range(max(WARM_UP_BATCHES))]
        rows = np.zeros((WARM_UP_TOKENS - 1, self.features.width), np.uint16) if self.features else NO_FEATURES
        tokens = list(range(WARM_UP_TOKENS))
        for batch in WARM_UP_BATCHES:
            sequences = [
                DraftSequence(session, 0, tokens, SamplingParams(), "smart", WARM_UP_NODES, WARM_UP_NODES, 1.0, rows)
                for session in sessions[:batch]
            ]
            self.draft(DraftRequest(0, plan, sequences))
        self.release(sessions)

    def measure(self) -> tuple[float, float]:
        """(seconds of a draft layer, seconds of each node in it); 0 without a model or head."""
        return self._model.measure() if self._model else (0.0, 0.0)

    def close(self) -> None:
        self._memory.release(self._memory)

    def _stats(self, started_s: float) -> DraftStats:
        draft_s = time.perf_counter() - started_s
        if self._model is None:
            return DraftStats(draft_s)
        layers = self._model.stats
        return DraftStats(draft_s, tuple(layers.nodes), layers.catch_up_tokens, tuple(layers.seconds))


def build_drafter(
    config: DrafterConfig,
    target: ModelConfig,
    limits: LimitsConfig,
    vocabulary_sha256: str | None,
) -> TreeDrafter:
    """The drafter that `config` describes for a target, with its model or head loaded and measured.

    Args:
        vocabulary_sha256: of the target; None leaves the comparison to the verifier.

    Raises:
        ConfigError: the draft model or head cannot be loaded, or does not share the target's vocabulary.
    """
    head_folder = find_head(config, target)
    if head_folder is not None:
        info, proposer = _build_head(head_folder, config, target, limits)
    elif "model" in config.kind:
        info, proposer = _build_model(config, limits)
    else:
        return TreeDrafter(DrafterInfo("none"), config.max_sessions, None)
    if vocabulary_sha256 is not None and info.vocabulary_sha256 != vocabulary_sha256:
        raise another_vocabulary(info, f"sha256 {vocabulary_sha256[:12]}")
    layer_s, node_s = proposer.measure()
    return TreeDrafter(replace(info, layer_s=layer_s, node_s=node_s), config.max_sessions, proposer)


def another_vocabulary(info: DrafterInfo, target: str) -> ConfigError:
    """The error for a drafter whose vocabulary is not the target's. `target`: its name, or its digest."""
    return ConfigError(
        f"the draft model {info.name} has another vocabulary (sha256 {info.vocabulary_sha256[:12]}) "
        f"than the target ({target}); a drafter needs the target's tokenizer"
    )


def find_head(config: DrafterConfig, target: ModelConfig) -> Path | None:
    """The folder of the draft head to use, if any: the configured one, or the default target's.

    Raises:
        ConfigError: a head is required and there is none.
    """
    if config.kind != "auto" and "head" not in config.kind:
        return None
    if config.head is not None:
        return resolve_head(str(config.head))
    if target.model == DEFAULT_MODEL and DEFAULT_HEAD.is_dir():
        return DEFAULT_HEAD
    if config.kind == "auto":
        return None
    raise ConfigError(f"'{target.model}' has no draft head: set drafter.head, or make one with treeline distill")


def _build_model(config: DrafterConfig, limits: LimitsConfig) -> tuple[DrafterInfo, LayeredProposer]:
    from drafter_svc.model_proposer import ModelProposer  # these load transformers, which no head needs
    from lm.model import LanguageModel

    assert config.model is not None
    model = LanguageModel.load(config.model)
    cache = model.new_cache(config.kv_cache_tokens, "auto")
    model.capture(cache)
    info = DrafterInfo(model.name, model.vocab_size, sha256_of(model.tokenizer))
    return info, ModelProposer(model, cache, limits.max_tree_nodes)


def _build_head(
    folder: Path, config: DrafterConfig, target: ModelConfig, limits: LimitsConfig
) -> tuple[DrafterInfo, LayeredProposer]:
    head = DraftHead.load(folder, target, tuple(config.head_layers or ()))
    cache = head.new_cache(config.kv_cache_tokens, "auto")
    head.capture(cache)
    features = FeatureSpec(head.config.feature_layers, head.config.feature_width)
    info = DrafterInfo(head.name, head.vocab_size, head.config.vocabulary_sha256, features=features)
    return info, HeadProposer(head, cache, limits.max_tree_nodes)
