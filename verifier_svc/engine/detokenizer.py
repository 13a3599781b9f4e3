"""From tokens to text. Text is released once no later token can change it and no stop string can begin in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from os.path import commonprefix

from tokenizers import Tokenizer

UNKNOWN = "\ufffd"
"""Stands for invalid UTF-8, and for a character whose last bytes have not arrived."""
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""A token of a byte-fallback vocabulary. One invalid byte turns every byte of an unbroken run into U+FFFD."""
CONTEXT_TOKENS = 5
"""Prompt tokens that the answer's text depends on: one for spaces, up to 3 bytes of a split character, one spare."""


class Detokenizer:
    """The text of one answer, piece by piece. Feed every token once, in order.

    The pieces add up to the text of prompt and answer without that of the prompt, up to a stop string.

    Args:
        include_stop: keep the stop string that ends the text.
        skip_special: leave special tokens out of the text.
        min_tokens: stop strings are ignored in the text of this many first tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        prompt: Sequence[int] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._special = _special_ids(tokenizer) if skip_special else frozenset[int]()
        self._stop, self._include_stop = stop, include_stop
        self._unlooked_tokens = min_tokens + 1
        self._held = ""
        self.matched_stop: str | None = None
        # A window of tokens that decodes like the end of the whole text: those of `_shown`, then newer ones.
        self._window = self._context(prompt)
        self._shown = self._decoded()

    def feed(self, token_id: int) -> str:
        """The text that is now certain. Sets `matched_stop`, after which no token may be fed."""
        self._unlooked_tokens -= 1
        token = self._token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        if BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decoded()
        if text.endswith(UNKNOWN):
            return self._release(self._new(text[:-1]))
        piece = self._new(text)
        self._window = self._window[-1:]
        self._shown = self._decoded()
        return self._release(piece)

    def flush(self) -> str:
        """The text held back, after the request has ended without a stop string."""
        if self.matched_stop is not None:
            return ""
        text = self._release(self._new(self._decoded()))
        if self.matched_stop is None:
            text, self._held = text + self._held, ""
        return text

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens, back to one that is no byte token: a run of bytes decodes as a whole."""
        context: list[int] = []
        for token_id in reversed(prompt):
            if (token := self._token(token_id)) is None:
                continue
            context.append(token_id)
            if len(context) >= CONTEXT_TOKENS and not BYTE_TOKEN.fullmatch(token):
                break
        return context[::-1]

    def _token(self, token_id: int) -> str | None:
        """The spelling of a token; None if it has no text."""
        return None if token_id in self._special else self._tokenizer.id_to_token(token_id)

    def _new(self, text: str) -> str:
        """The part of the window's `text` that was not shown yet."""
        new = text[len(commonprefix((self._shown, text))) :]  # noqa: RUF071 (of characters, as wanted)
        self._shown = text if new else self._shown
        return new

    def _release(self, piece: str) -> str:
        """Add `piece` to the held text, and release all of it that cannot be part of a stop string."""
        if self._unlooked_tokens > 0:
            return piece
        self._held += piece
        # The stop string that ends first: the result must not depend on how the text was cut into pieces.
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            end, start, self.matched_stop = min(ends)
            text, self._held = self._held[: end if self._include_stop else start], ""
            return text
        cut = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[:cut], self._held[cut:]
        return text


@functools.lru_cache(maxsize=2)
def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
