"""Drafters for tests: they know the answer, or nothing at all, and wrap it in trees of every shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.trees import tree_of
from treeline.drafting import DraftReply, DraftRequest, FeatureSpec
from treeline.forest import ROOT, Forest


class OracleDrafter:
    """Proposes the known continuation with decoys around it, cut or spoiled at random; never twice the same shape."""

    features: FeatureSpec | None = None

    def __init__(self, continuation: Callable[[list[int]], list[int]], vocab_size: int, seed: int = 0) -> None:
        self._continuation = continuation
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(seed)
        self.tokens: dict[int, list[int]] = {}
        self.drafted_nodes = 0

    def draft(self, request: DraftRequest) -> DraftReply:
        for session_id in request.released:
            self.tokens.pop(session_id, None)
        trees: list[Forest] = []
        held = {}
        for sequence in request.sequences:
            tokens = self.tokens.setdefault(sequence.session_id, [])
            if len(tokens) < sequence.start:
                held[sequence.session_id] = len(tokens)
                trees.append(Forest.empty(1))
                continue
            tokens[sequence.start :] = sequence.token_ids
            tree = self._tree(self._continuation(tokens), sequence.max_nodes, sequence.max_depth)
            self.drafted_nodes += len(tree)
            trees.append(tree)
        return DraftReply(request.step_id, Forest.join([Forest.empty(0), *trees]), held)

    def lose(self, session_id: int) -> None:
        """Forget a session, as a restarted or evicting drafter does."""
        self.tokens.pop(session_id, None)

    def close(self) -> None:
        self.tokens.clear()

    def _tree(self, known: list[int], max_nodes: int, max_depth: int) -> Forest:
        random = self._random
        token_ids: list[int] = []
        parents: list[int] = []
        on_path = ROOT
        for depth in range(random.integers(0, max_depth + 1)):
            if depth >= len(known):
                break
            children = {int(random.integers(self._vocab_size)) for _ in range(random.integers(0, 3))}
            if random.random() < 0.85:
                children.add(known[depth])
            order = list(children)
            random.shuffle(order)
            parent, on_path = on_path, None
            for token in order[: max_nodes - len(token_ids)]:
                if token == known[depth]:
                    on_path = len(token_ids)
                token_ids.append(token)
                parents.append(parent)
            if on_path is None:
                break
        probs = random.uniform(0.05, 1.0, len(token_ids)).tolist()
        return tree_of(token_ids, parents, probs)


class SilentLink:
    """A drafter that never answers."""

    connected = ready = True
    features = None

    def refresh(self) -> None:
        pass

    def draft(self, request: DraftRequest, timeout_s: float) -> None:
        return None

    def close(self) -> None:
        pass
