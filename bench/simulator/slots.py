"""The requests that one simulated verifier runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.fast.weights import urgency

PREFILL_CHUNK_TOKENS = 512


class Request(NamedTuple):
    """target_s: the time per output token that it asks for; infinite if it asks for none."""

    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    target_s: float


class Finished(NamedTuple):
    """Requests that have ended; columns of equal length. itl_s: mean time per token after the first."""

    target_s: list[float]
    itl_s: list[float]


@dataclass(slots=True)
class _Slot:
    """What changes of a request seldom: tokens of its prompt that are still to be run, when its first token came."""

    request: Request
    prompt_left: int
    first_s: float = 0.0


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
        self._taken: list[_Slot] = []

    def admit(self, request: Request) -> None:
        self.left[self.count] = request.output_tokens
        self._taken.append(_Slot(request, request.prompt_tokens))
        self.context_tokens += request.prompt_tokens
        self.count += 1

    def prefill(self) -> tuple[int, int]:
        """Run the next chunk of prompts: (tokens in it, requests whose prompt ends with it)."""
        budget, begun = PREFILL_CHUNK_TOKENS, 0
        for slot in self._taken[self.decoding :]:
            taken = min(budget, slot.prompt_left)
            slot.prompt_left -= taken
            budget -= taken
            if slot.prompt_left:
                break
            begun += 1
        return PREFILL_CHUNK_TOKENS - budget, begun

    def emit(self, left: NDArray[np.int64], tokens: NDArray[np.int64]) -> int:
        """Some requests, whose part of `left` this is, emit so many tokens each: how many in all."""
        left -= tokens
        count = sum(tokens.tolist())  # faster than by arrays
        self.context_tokens += count
        return count

    def begin(self, begun: int, now_s: float) -> list[float]:
        """The first token of those whose prompt has ended: how long each has waited for it."""
        fresh = slice(self.decoding, self.decoding + begun)
        self.left[fresh] -= 1
        for slot in self._taken[fresh]:
            slot.first_s = now_s
        self.context_tokens += begun
        self.decoding += begun
        return [now_s - slot.request.arrived_s for slot in self._taken[fresh]]

    def finish(self, now_s: float) -> Finished | None:
        """Free the slots of those that have nothing left to emit; None if there are none."""
        left = self.left[: self.count]
        if np.count_nonzero(left) == self.count:
            return None
        ended = [self._taken.pop(place) for place in reversed((left == 0).nonzero()[0].tolist())]
        stays = left[left.nonzero()]
        self.left[: len(stays)] = stays
        self.count = len(stays)
        self.decoding -= len(ended)
        self.context_tokens -= sum([slot.request.prompt_tokens + slot.request.output_tokens for slot in ended])
        itl_s = [(now_s - slot.first_s) / max(1, slot.request.output_tokens - 1) for slot in ended]
        return Finished([slot.request.target_s for slot in ended], itl_s)

    def drop(self, place: int) -> None:
        """All requests from `place` on are cancelled."""
        for slot, left in zip(self._taken[place:], self.left[place : self.count].tolist(), strict=True):
            self.context_tokens -= slot.request.prompt_tokens + slot.request.output_tokens - left
        del self._taken[place:]
        self.count, self.decoding = min(place, self.count), min(place, self.decoding)

    def weights(self, part: slice, now_s: float) -> NDArray[np.float64]:
        """float64 [n]: what a token of each is worth, 1 on average, as the verifier has it."""
        found = np.asarray(
            [
                urgency((now_s - slot.first_s) / slot.request.target_s - (slot.request.output_tokens - left - 1))
                for slot, left in zip(self._taken[part], self.left[part].tolist(), strict=True)
            ]
        )
        return found * (len(found) / found.sum())
