"""Grammars on trees: the tokens that may follow each node's own path."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray


class Grammar(NamedTuple):
    """A compiled grammar. `matcher`: at the start of the answer; it is copied, never advanced."""

    matcher: LLMatcher
    vocab_size: int

    def warm_up(self) -> str:
        """Build what the first mask needs, outside the engine's thread; returns the error, empty if there is none."""
        bits = _mask(self.matcher, self.vocab_size).view(np.uint8)
        first = int(np.unpackbits(bits, bitorder="little").argmax())
        probe = self.matcher.deep_copy()  # Some errors show only when a token is consumed.
        probe.consume_token(first)
        return probe.get_error()

    def begin(self) -> GrammarState:
        """The state before an answer's first token."""
        return GrammarState(self.matcher.deep_copy(), self.vocab_size)


class GrammarState:
    """One request's position in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._forced: list[int] | None = None  # not yet looked for

    @property
    def forced(self) -> list[int]:
        """Tokens of the text that must come next; the model may tokenise that text differently."""
        if self._forced is None:
            self._forced = self._matcher.compute_ff_tokens()
        return self._forced

    def take(self, token_id: int) -> None:
        """Advance by the answer's next token.

        Raises:
            ValueError: the token is not allowed: the grammar is at a dead end, or has become too complex.
        """
        self._forced = None
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"the grammar failed: {self._matcher.get_error().splitlines()[0]}")

    @property
    def ended(self) -> bool:
        """Whether the text is complete and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allows(self, path: list[int]) -> bool:
        """Whether all these tokens may follow the text."""
        return self._matcher.validate_tokens(path) == len(path)

    def allowed(self, path: list[int]) -> NDArray[np.int32]:
        """The tokens that may follow text and `path`, end tokens included where the text may end, as `Row.allowed`."""
        matcher = self._matcher
        if path:
            matcher = matcher.deep_copy()
            matcher.consume_tokens(path)
        return _mask(matcher, self._vocab_size)


def _mask(matcher: LLMatcher, vocab_size: int) -> NDArray[np.int32]:
    words = np.zeros((1, -(-vocab_size // 32)), np.int32)
    fill_next_token_bitmask(matcher, words)
    return words[0]
