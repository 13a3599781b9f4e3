"""What the drafter knows of its requests: their tokens, as far as verifiers have told it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeline.drafting import NO_FEATURES, DraftSequence


@dataclass
class Session:
    """One request's tokens.

    Attributes:
        tokens: the whole sequence, the last token being the next tree's root.
        unchanged: leading tokens that the latest update left as they were; proposers keep what they built from these.
        features: of the latest update (see `DraftSequence`).
    """

    session_id: int
    tokens: list[int] = field(default_factory=list)
    unchanged: int = 0
    features: NDArray[np.uint16] = field(default_factory=lambda: NO_FEATURES)

    def update(self, start: int, token_ids: list[int], features: NDArray[np.uint16] = NO_FEATURES) -> None:
        """Replace everything from `start` on by `token_ids`."""
        self.features = features
        old = self.tokens[start:]
        same = next((i for i, (a, b) in enumerate(zip(old, token_ids, strict=False)) if a != b), None)
        self.unchanged = start + (min(len(old), len(token_ids)) if same is None else same)
        self.tokens[start:] = token_ids


class SessionStore:
    """At most `max_sessions` sessions; a new one takes the place of the one that was used least recently."""

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[int, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sessions)

    def admit(self, sequences: list[DraftSequence]) -> tuple[dict[int, Session], dict[int, int], list[int]]:
        """Bring the sessions of one draft step up to date.

        A session that lacks tokens before its sequence's `start` stays as it is. One step's sessions never displace
        one another, so beyond `max_sessions` of them the later ones are not admitted.

        Returns:
            The sessions that are up to date; tokens held by each of the others; sessions that had to go.
        """
        for sequence in sequences:
            if sequence.session_id in self._sessions:
                self._sessions.move_to_end(sequence.session_id)
        current = {sequence.session_id for sequence in sequences}
        admitted: dict[int, Session] = {}
        held: dict[int, int] = {}
        evicted: list[int] = []
        for sequence in sequences:
            session = self._sessions.get(sequence.session_id)
            held_tokens = len(session.tokens) if session else 0
            if held_tokens < sequence.start:
                held[sequence.session_id] = held_tokens
                continue
            if session is None:
                if len(self._sessions) >= self._max_sessions:
                    oldest = next(iter(self._sessions))
                    if oldest in current:
                        held[sequence.session_id] = 0
                        continue
                    del self._sessions[oldest]
                    evicted.append(oldest)
                session = self._sessions[sequence.session_id] = Session(sequence.session_id)
            session.update(sequence.start, sequence.token_ids, sequence.features)
            admitted[sequence.session_id] = session
        return admitted, held, evicted

    def release(self, session_id: int) -> None:
        """Forget a session; unknown ones are ignored."""
        self._sessions.pop(session_id, None)
