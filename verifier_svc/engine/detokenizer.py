"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Incremental text of one request. Feed it every token once, in order."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._stop = stop
        self._held = ""
        self.matched_stop: str | None = None

    def feed(self, token_id: int) -> str:
        """The text that is now certain. Sets `matched_stop`, after which nothing may be fed."""
        self._undecoded.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._undecoded.clear()
        return self._release(piece)

    def flush(self) -> str:
        """What was held back, once the request has ended otherwise than by a stop string."""
        if self.matched_stop is not None:
            return ""
        tail = self._tokenizer.decode(self._undecoded) if self._undecoded else ""
        self._undecoded.clear()
        text = self._release(tail)
        if self.matched_stop is None:
            text += self._held
            self._held = ""
        return text

    def _release(self, piece: str) -> str:
        """Add `piece` to what is held, and let go of all that cannot become part of a stop string."""
        self._held += piece
        if not self._stop:
            text, self._held = self._held, ""
            return text
        matches = [(index, stop) for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if matches:
            index, self.matched_stop = min(matches, key=lambda match: match[0])
            text, self._held = self._held[:index], ""
            return text
        keep = max(_longest_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _longest_overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
