"""Loops that take turns on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bench.load import Clock, Loop, Window


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
    """Run loops to their ends, `turn_s` of each at a time or one poll, so that what the machine does hits all alike.

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
