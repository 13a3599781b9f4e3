"""Drafts of a given quality, for targets that have no drafter: the true next token planted among wrong ones.

The target's answers are known from a run without drafts. The policies grow trees as usual and real passes verify them,
so outputs stay the target's own. Only drafting is simulated: it costs just Python time.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate

import numpy as np

from drafter_svc.proposer import Children, Frontier, Root
from drafter_svc.sessions import Key, Session, SessionMemory
from treeline.errors import ConfigError
from treeline.forest import Source

LEAST_PROB = 1e-3


Acceptance = tuple[tuple[float, ...], ...]
"""For depth 1, 2, ..., the last entry for all deeper ones: probabilities that the true token is the first, second, ...
choice below an accepted node."""


def parse_acceptance(text: str) -> Acceptance:
    """From "0.6,0.15,0.05/0.5,0.1": ranks separated by commas, depths by slashes.

    Raises:
        ConfigError: the text does not spell such probabilities.
    """
    try:
        parsed = tuple(tuple(float(rank) for rank in depth.split(",")) for depth in text.split("/"))
    except ValueError:
        parsed = ()
    if not parsed or any(min(ranks) < 0 or sum(ranks) > 1 for ranks in parsed):
        raise ConfigError(
            f"acceptance '{text}': probabilities by rank separated by commas, such as 0.6,0.15,0.05, adding up to 1 at "
            "most; depths separated by slashes"
        )
    return parsed


class SyntheticProposer:
    """Knows each sequence's true continuation and plants it among decoys: at each position at one rank, or not at all.

    Below a node off the true path there are only decoys. Probabilities are those that a drafter would claim if it knew
    its acceptance but not the truth.

    Args:
        answers: the target's token ids by prompt.
    """

    source = Source.MODEL

    def __init__(self, acceptance: Acceptance, answers: dict[tuple[int, ...], list[int]], vocab_size: int) -> None:
        self._acceptance, self._vocab_size = acceptance, vocab_size
        self._texts = [[*prompt, *answer] for prompt, answer in answers.items()]
        self._of_session: dict[Key, list[int]] = {}
        self._on_path: list[bool] = []  # of each node of the last frontier

    def begin(self, sessions: list[Session], memory: SessionMemory) -> None:
        open_keys = set(memory)
        self._of_session = {key: text for key, text in self._of_session.items() if key in open_keys}

    def propose(self, roots: list[Root], frontier: Frontier) -> Children:
        depth, found = frontier.depth, list[tuple[int, int, float, int]]()
        ranks = self._acceptance[min(depth, len(self._acceptance) - 1)]
        before, on_path = self._on_path, list[bool]()
        for node, (tree, token, above) in enumerate(
            zip(frontier.tree_of.tolist(), frontier.token_ids.tolist(), frontier.above.tolist(), strict=True)
        ):
            root = roots[tree]
            following = self._rest(root.session)
            right = depth == 0 or (before[above] and following[depth - 1 : depth] == [token])
            on_path.append(right)
            true = following[depth] if depth < len(following) else None
            position = len(root.session.tokens) + depth
            planted = None if true is None else self._rank(true, position, ranks)
            for rank, prob in enumerate(ranks[: root.policy.max_children]):
                hit = right and rank == planted and true is not None
                token_id = true if hit and true is not None else self._decoy(true, position, rank)
                found.append((node, token_id, max(prob, LEAST_PROB), rank))
        self._on_path = on_path
        if not found:
            return Children.none()
        nodes, token_ids, probs, places = zip(*found, strict=True)
        return Children(
            np.asarray(nodes, np.intp),
            np.asarray(token_ids, np.int32),
            np.asarray(probs, np.float32),
            np.asarray(places, np.uint8),
        )

    def _rest(self, session: Session) -> list[int]:
        """The true tokens after the session's root; none if its text is unknown."""
        length = len(session.tokens)
        for text in (self._of_session.get(session.key, []), *self._texts):
            if text[:length] == session.tokens:
                self._of_session[session.key] = text
                return text[length:]
        return []

    def _rank(self, true: int, position: int, ranks: tuple[float, ...]) -> int | None:
        """Rank at which the true token is planted at this position: always the same one, or None."""
        digest = hashlib.blake2b(f"{position} {true}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / 2**64
        return next((rank for rank, below in enumerate(accumulate(ranks)) if drawn < below), None)

    def _decoy(self, true: int | None, position: int, rank: int) -> int:
        """A token that is not the true one, a different one for each rank."""
        first = 0 if true is None else true + 1
        return (first + (position * 7 + rank) % (self._vocab_size - 1)) % self._vocab_size
