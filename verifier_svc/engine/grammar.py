"""Grammars on trees: which tokens may follow each node, by the text of its own path."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray


class Grammar(NamedTuple):
    """A compiled grammar. `matcher`: at the beginning of the answer, and never moved."""

    matcher: LLMatcher
    vocab_size: int

    def warm_up(self) -> str:
        """Build what the first mask needs, so that the engine need not; returns why that is too much, or nothing."""
        first = int(_mask(self.matcher, self.vocab_size).argmax())
        probe = self.matcher.deep_copy()  # An error shows only when a token is taken.
        probe.consume_token(first)
        return probe.get_error()

    def begin(self) -> GrammarState:
        """Where an answer's first token stands."""
        return GrammarState(self.matcher.deep_copy(), self.vocab_size)


class GrammarState:
    """How far the text of one request has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def take(self, token_id: int) -> None:
        """The answer goes on with this token.

        Raises:
            ValueError: it may not: the grammar has come to a dead end, or has become too complex.
        """
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"the grammar ends: {self._matcher.get_error().splitlines()[0]}")

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allows(self, path: list[int]) -> bool:
        """Whether the text may go on with all these tokens."""
        return self._matcher.validate_tokens(path) == len(path)

    def allowed(self, path: list[int]) -> NDArray[np.bool_]:
        """bool [vocab]: what may follow `path`, tokens behind the text so far; its end where the text may end."""
        matcher = self._matcher
        if path:
            matcher = matcher.deep_copy()
            matcher.consume_tokens(path)
        return _mask(matcher, self._vocab_size)


def _mask(matcher: LLMatcher, vocab_size: int) -> NDArray[np.bool_]:
    words = np.zeros((1, -(-vocab_size // 32)), np.int32)
    fill_next_token_bitmask(matcher, words)
    return np.unpackbits(words.view(np.uint8)[0], bitorder="little")[:vocab_size].astype(np.bool_)
