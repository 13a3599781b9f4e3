"""The requests that one simulated verifier runs, as columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.weights import urgency

PREFILL_CHUNK_TOKENS = 512


class Request(NamedTuple):
    """target_s: the time per output token that it asks for; infinite if it asks for none."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    target_s: float


class Finished(NamedTuple):
    """Requests that have ended; columns of equal length. itl_s: mean time per token after the first."""

    target_s: NDArray[np.float64]
    itl_s: NDArray[np.float64]


class Slots:
    """Requests in order of their admission, so that those that decode come before those that still run their prompt.

    Attributes:
        count, decoding: requests, and those of them that decode.
        context_tokens: committed tokens of all, prompts included.
        left: int64 [slots]: tokens that each has still to emit.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.count = self.decoding = self.context_tokens = 0
        self.left = np.zeros(slots, np.int64)
        self._prompt, self._output, self._prompt_left = (np.zeros(slots, np.int64) for _ in range(3))
        self._arrived_s, self._first_s, self._target_s = np.zeros(slots), np.zeros(slots), np.zeros(slots)
        self._columns = (
            self.left, self._prompt, self._output, self._prompt_left, self._arrived_s, self._first_s, self._target_s
        )  # fmt: skip

    def admit(self, request: Request) -> None:
        place = self.count
        self.left[place] = self._output[place] = request.output_tokens
        self._prompt[place] = self._prompt_left[place] = request.prompt_tokens
        self._arrived_s[place], self._target_s[place] = request.arrived_s, request.target_s
        self.context_tokens += request.prompt_tokens
        self.count += 1

    def prefill(self) -> tuple[int, int]:
        """Run the next chunk of prompts: (tokens in it, requests whose prompt ends with it)."""
        budget, begun = PREFILL_CHUNK_TOKENS, 0
        for place in range(self.decoding, self.count):
            taken = min(budget, int(self._prompt_left[place]))
            self._prompt_left[place] -= taken
            budget -= taken
            if self._prompt_left[place]:
                break
            begun += 1
        return PREFILL_CHUNK_TOKENS - budget, begun

    def emit(self, part: slice, tokens: NDArray[np.int64]) -> int:
        """The requests of `part` emit so many tokens each: how many in all."""
        self.left[part] -= tokens
        count = int(tokens.sum())
        self.context_tokens += count
        return count

    def begin(self, begun: int, now_s: float) -> list[float]:
        """The first token of those whose prompt has ended: how long each has waited for it."""
        fresh = slice(self.decoding, self.decoding + begun)
        self.left[fresh] -= 1
        self._first_s[fresh] = now_s
        self.context_tokens += begun
        self.decoding += begun
        return (now_s - self._arrived_s[fresh]).tolist()

    def finish(self, now_s: float) -> Finished | None:
        """Free the slots of those that have nothing left to emit; None if there are none."""
        left = self.left[: self.count]
        if np.count_nonzero(left) == self.count:
            return None
        ended = (left == 0).nonzero()[0]
        outputs = self._output[ended]
        finished = Finished(self._target_s[ended], (now_s - self._first_s[ended]) / np.maximum(1, outputs - 1))
        self.context_tokens -= int((self._prompt[ended] + outputs).sum())
        stays = left.nonzero()[0]
        for column in self._columns:
            column[: len(stays)] = column[stays]
        self.count = len(stays)
        self.decoding -= len(ended)
        return finished

    def drop(self, place: int) -> None:
        """All requests from `place` on are cancelled."""
        dropped = slice(place, self.count)
        contexts = self._prompt[dropped] + self._output[dropped] - self.left[dropped]
        self.context_tokens -= int(contexts.sum())
        self.count, self.decoding = min(place, self.count), min(place, self.decoding)

    def weights(self, part: slice, now_s: float) -> NDArray[np.float64]:
        """float64 [n]: what a token of each is worth, 1 on average, as the verifier has it."""
        due = (now_s - self._first_s[part]) / self._target_s[part]
        behind = due - (self._output[part] - self.left[part] - 1)
        found = np.asarray([urgency(tokens) for tokens in behind.tolist()])
        return found * (len(found) / found.sum())
