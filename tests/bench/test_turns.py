"""Loops that take turns, and the clocks that they go by."""

from __future__ import annotations

import math
import time

import pytest

from bench.load import Clock, Loop, Window, in_turns

POLL_S = 0.01


def loop_of(name: str, polls: int, order: list[str]):
    """Takes so many polls of POLL_S each, and tells when it began and ended by its own clock."""

    def loop(clock: Clock) -> Loop:
        began_s = clock()
        for poll in range(polls):
            order.append(name)
            time.sleep(POLL_S)
            if poll < polls - 1:
                yield
        return Window([], began_s, clock())

    return loop


def test_a_clock_stands_still_while_others_have_their_turn():
    order: list[str] = []
    loops = [loop_of("a", 4, order), loop_of("b", 2, order)]
    ended = {index: (window, seconds) for index, window, seconds in in_turns(loops, turn_s=POLL_S / 2)}
    assert order == ["a", "b", "a", "b", "a", "a"]
    assert list(ended) == [1, 0]
    for index, polls in ((0, 4), (1, 2)):
        window, seconds = ended[index]
        assert window.opened_s == pytest.approx(0, abs=POLL_S / 2)
        assert polls * POLL_S <= window.closed_s <= seconds < (polls + 1) * POLL_S


def test_loops_that_cannot_be_halted_follow_each_other():
    order: list[str] = []
    assert [index for index, _, _ in in_turns([loop_of("a", 3, order), loop_of("b", 2, order)], math.inf)] == [0, 1]
    assert order == ["a", "a", "a", "b", "b"]


def test_what_goes_wrong_in_a_loop_is_told():
    def broken(clock: Clock) -> Loop:
        yield
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        list(in_turns([loop_of("a", 2, []), broken], turn_s=0.0))
