"""Which blocks are free, as runs of consecutive ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise


class FreeRuns:
    """Runs [start, stop) of free blocks, in order and by length, so that no search looks at all of them."""

    def __init__(self, blocks: int) -> None:
        self._runs: list[tuple[int, int]] = []
        self._by_length: list[tuple[int, int]] = []
        """(length, start)"""
        self._count = 0
        self._insert(0, blocks)

    def __len__(self) -> int:
        """Free blocks."""
        return self._count

    def add(self, blocks: list[int]) -> None:
        """These blocks, none of which is free, are free from now on."""
        ordered = sorted(blocks)
        breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1), len(ordered)]
        for first, end in pairwise(breaks):
            if end > first:
                self._merge(ordered[first], ordered[end - 1] + 1)

    def take(self, needed: int, after: int = -1) -> list[int]:
        """So many free blocks: first those that follow block `after`, then of the shortest run that holds them all,
        else of the longest runs.

        Raises:
            ValueError: there are not so many.
        """
        if needed > self._count:
            raise ValueError(f"{needed} blocks are wanted, {self._count} are free")
        taken: list[int] = []
        place = bisect_left(self._runs, (after + 1, 0))
        if after >= 0 and place < len(self._runs) and self._runs[place][0] == after + 1:
            taken += self._cut(*self._runs[place], needed)
        while len(taken) < needed:
            missing = needed - len(taken)
            fitting = bisect_left(self._by_length, (missing, -1))
            length, start = self._by_length[min(fitting, len(self._by_length) - 1)]
            taken += self._cut(start, start + length, missing)
        return taken

    def _cut(self, start: int, stop: int, most: int) -> range:
        """Takes up to `most` blocks from the beginning of a run."""
        end = min(stop, start + most)
        self._remove(start, stop)
        self._insert(end, stop)
        return range(start, end)

    def _merge(self, start: int, stop: int) -> None:
        place = bisect_left(self._runs, (start, stop))
        after = self._runs[place] if place < len(self._runs) else None
        before = self._runs[place - 1] if place else None
        if after is not None and after[0] == stop:
            self._remove(*after)
            stop = after[1]
        if before is not None and before[1] == start:
            self._remove(*before)
            start = before[0]
        self._insert(start, stop)

    def _insert(self, start: int, stop: int) -> None:
        if stop > start:
            insort(self._runs, (start, stop))
            insort(self._by_length, (stop - start, start))
            self._count += stop - start

    def _remove(self, start: int, stop: int) -> None:
        del self._runs[bisect_left(self._runs, (start, stop))]
        del self._by_length[bisect_left(self._by_length, (stop - start, start))]
        self._count -= stop - start
