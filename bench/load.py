"""Load generators: closed loop with a fixed number of streams, open loop with Poisson arrivals.

A loop is a generator, so that loops can take turns on one machine; its times are seconds of its own clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

from bench.common import Prompt
from treeline.errors import QueueFullError

POLL_S = 1.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class Request:
    id: str
    prompt: Prompt
    max_tokens: int
    policy: str


@dataclass(frozen=True)
class Tokens:
    """One request's tokens from one step."""

    request_id: str
    token_ids: list[int]


@dataclass(frozen=True)
class End:
    """The end of a request, and its verification steps.

    Attributes:
        finished: ended by itself; False if it was aborted.
        rejected: never started, because the queue was full.
        verified_nodes, accepted_nodes: over all its `steps`.
    """

    request_id: str
    finished: bool = False
    rejected: bool = False
    steps: int = 0
    verified_nodes: int = 0
    accepted_nodes: int = 0


class System(Protocol):
    """What is put under load: an engine in this process, or a service. Used from one thread."""

    def submit(self, request: Request) -> None: ...

    def poll(self, timeout_s: float) -> list[Tokens | End]:
        """Events since the last call; waits up to `timeout_s` if there are none."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests; each End comes with a later poll."""
        ...


@dataclass
class Answer:
    """One request as its sender sees it.

    Attributes:
        sent_s: when it was due to be sent, so that a late sender of an open loop does not flatter the service.
        arrivals: (time, tokens) of each chunk.
        ended_s: None while it is open.
    """

    request: Request
    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end: End | None = None
    ended_s: float | None = None

    @property
    def finished(self) -> bool:
        return self.end is not None and self.end.finished

    @property
    def gaps(self) -> list[tuple[float, float, int]]:
        """(time, seconds a token, tokens) of each chunk but the first one: its tokens waited an equal share."""
        pairs = pairwise(self.arrivals)
        return [(time_s, (time_s - before_s) / count, count) for (before_s, _), (time_s, count) in pairs]


@dataclass(frozen=True)
class Window:
    """Answers, in the order of their requests, and the time in which they were measured."""

    answers: list[Answer]
    opened_s: float
    closed_s: float

    def contains(self, time_s: float) -> bool:
        return self.opened_s < time_s <= self.closed_s


Loop = Generator[None, None, Window]
"""Puts a system under load, one poll per `next`; returns what was measured."""


class _Sender:
    """Sends requests and keeps what comes back."""

    def __init__(self, system: System, clock: Clock) -> None:
        self._system, self._clock = system, clock
        self.answers: dict[str, Answer] = {}
        self.open: set[str] = set()
        self.rejected = 0

    def submit(self, request: Request, sent_s: float) -> None:
        self.answers[request.id] = Answer(request, sent_s)
        self.open.add(request.id)
        self._system.submit(request)

    def poll(self, timeout_s: float = POLL_S) -> None:
        events, now_s = self._system.poll(timeout_s), self._clock()
        for event in events:
            answer = self.answers[event.request_id]
            if isinstance(event, End):
                answer.end, answer.ended_s = event, now_s
                self.rejected += event.rejected
                self.open.remove(event.request_id)
            else:
                answer.token_ids += event.token_ids
                answer.arrivals.append((now_s, len(event.token_ids)))

    def abort(self) -> None:
        """End all that is open and wait for it."""
        self._system.abort(sorted(self.open))
        while self.open:
            self.poll()

    @property
    def last_end_s(self) -> float:
        return max(answer.ended_s for answer in self.answers.values() if answer.ended_s is not None)


def closed_loop(system: System, requests: Sequence[Request], streams: int, limit_s: float, clock: Clock) -> Loop:
    """Keep `streams` requests open: when one ends, the next one is sent at once.

    The window opens when each of the first `streams` requests has its first token. It closes when a stream has no next
    request, or `limit_s` after it opened: all streams are busy throughout, and stragglers are not measured. Requests
    still open then are aborted.

    Raises:
        QueueFullError: the system has no room for so many streams.
    """
    sender, waiting = _Sender(system, clock), deque(requests)
    opened_s: float | None = None
    while True:
        while waiting and len(sender.open) < streams:
            sender.submit(waiting.popleft(), clock())
        sender.poll()
        if sender.rejected:
            raise QueueFullError(f"there is no room for {streams} streams")
        if opened_s is None:
            opened_s = _all_started_s([sender.answers[r.id] for r in requests[:streams]])
        late = opened_s is not None and clock() - opened_s >= limit_s
        if late or len(sender.open) + len(waiting) < streams:
            break
        yield
    closed_s = clock() if late else sender.last_end_s
    sender.abort()
    return Window(list(sender.answers.values()), closed_s if opened_s is None else opened_s, closed_s)


def open_loop(system: System, requests: Sequence[Request], arrivals_s: Sequence[float], clock: Clock) -> Loop:
    """Send each request when it is due, seconds from now, however many are open. The window is the whole run."""
    sender, waiting = _Sender(system, clock), deque(zip(requests, arrivals_s, strict=True))
    started_s = clock()
    while waiting or sender.open:
        while waiting and started_s + waiting[0][1] <= clock():
            request, due_s = waiting.popleft()
            sender.submit(request, started_s + due_s)
        sender.poll(max(0.0, started_s + waiting[0][1] - clock()) if waiting else POLL_S)
        yield
    return Window(list(sender.answers.values()), started_s + arrivals_s[0], sender.last_end_s)


class _OwnTime:
    """Seconds of all turns so far; to be read within one."""

    def __init__(self) -> None:
        self._away_s = self._left_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._away_s

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._away_s += time.perf_counter() - self._left_s
        yield
        self._left_s = time.perf_counter()


def in_turns(loops: Sequence[Callable[[Clock], Loop]], turn_s: float) -> Iterator[tuple[int, Window, float]]:
    """Run loops to their ends in turns of `turn_s`, at least one poll each, so that machine noise hits all alike.

    Args:
        loops: each is given its clock, which stands still while others have their turn.

    Yields:
        (index, window, seconds of its own) of each loop as it ends.
    """
    clocks = [_OwnTime() for _ in loops]
    running = {index: loop(clocks[index].now_s) for index, loop in enumerate(loops)}
    while running:
        for index, loop in list(running.items()):
            own = clocks[index]
            with own.turn():
                window, took_s = _advance(loop, own.now_s, turn_s), own.now_s()
            if window is not None:
                del running[index]
                yield index, window, took_s


def _advance(loop: Loop, clock: Clock, turn_s: float) -> Window | None:
    """One turn of a loop; what came of it once it has ended."""
    until_s = clock() + turn_s
    try:
        next(loop)
        while clock() < until_s:
            next(loop)
    except StopIteration as end:
        window: Window = end.value
        return window
    return None


def poisson_arrivals(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests of a Poisson process arrive: its gaps are exponential."""
    gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, count)
    return np.cumsum(gaps).tolist()


@dataclass(frozen=True)
class Measured:
    """One window in numbers.

    Attributes:
        tokens_per_s: all tokens that came in the window, over its length.
        accepted_length: tokens per verification step, bonus token included, of all answers.
        tree_nodes: draft nodes verified per step and request.
        ttft_ms_p50: time to first token of requests sent in the window; None if none was.
        itl_ms_p50, itl_ms_p95: inter-token latency; the tokens of one chunk waited an equal share.
        rejected: requests that found the queue full.
    """

    tokens_per_s: float
    accepted_length: float
    tree_nodes: float
    ttft_ms_p50: float | None
    itl_ms_p50: float | None
    itl_ms_p95: float | None
    rejected: int


def measure(window: Window) -> Measured:
    """The numbers of a window of non-zero length."""
    ends = [answer.end for answer in window.answers if answer.end]
    steps = sum(end.steps for end in ends)
    tokens, ttft_s, itl_s = 0, [], []
    for answer in window.answers:
        tokens += sum(count for time_s, count in answer.arrivals if window.contains(time_s))
        for time_s, gap_s, count in answer.gaps:
            if window.contains(time_s):
                itl_s += [gap_s] * count
        if answer.arrivals and window.contains(answer.arrivals[0][0]) and answer.sent_s >= window.opened_s:
            ttft_s.append(answer.arrivals[0][0] - answer.sent_s)
    return Measured(
        tokens_per_s=tokens / (window.closed_s - window.opened_s),
        accepted_length=1 + sum(end.accepted_nodes for end in ends) / max(1, steps),
        tree_nodes=sum(end.verified_nodes for end in ends) / max(1, steps),
        ttft_ms_p50=_quantile_ms(ttft_s, 0.5),
        itl_ms_p50=_quantile_ms(itl_s, 0.5),
        itl_ms_p95=_quantile_ms(itl_s, 0.95),
        rejected=sum(end.rejected for end in ends),
    )


def _all_started_s(answers: Sequence[Answer]) -> float | None:
    """When the last of these got its first token; None while one of them waits."""
    return max(answer.arrivals[0][0] for answer in answers) if all(answer.arrivals for answer in answers) else None


def _quantile_ms(seconds: list[float], q: float) -> float | None:
    return 1000 * float(np.quantile(seconds, q)) if seconds else None
