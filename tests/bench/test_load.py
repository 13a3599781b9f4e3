"""Load generators, over a system whose clock the test owns."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bench.common import Prompt
from bench.load import Answer, End, Loop, Request, Tokens, Window, closed_loop, measure, open_loop, poisson_arrivals
from treeline.errors import QueueFullError

FOREVER_S = 1e9


class FakeSystem:
    """Gives every open request one token at each poll, one second of its own clock later.

    Attributes:
        open_at_polls: how many requests were open at each poll.
    """

    def __init__(self, places: int = 1000) -> None:
        self.now_s = 0.0
        self.places = places
        self.open: dict[str, int] = {}
        self.ended: list[End] = []
        self.order: list[str] = []
        self.open_at_polls: list[int] = []

    def submit(self, request: Request) -> None:
        self.order.append(request.id)
        if len(self.open) < self.places:
            self.open[request.id] = request.max_tokens
        else:
            self.ended.append(End(request.id, rejected=True))

    def poll(self, timeout_s: float) -> list[Tokens | End]:
        self.now_s += 1
        self.open_at_polls.append(len(self.open))
        events: list[Tokens | End] = [Tokens(request_id, [7]) for request_id in self.open]
        self.open = {request_id: left - 1 for request_id, left in self.open.items()}
        for request_id in [request_id for request_id, left in self.open.items() if not left]:
            del self.open[request_id]
            events.append(End(request_id, finished=True, steps=2, verified_nodes=6, accepted_nodes=3))
        events += self.ended
        self.ended = []
        return events

    def abort(self, request_ids) -> None:
        for request_id in request_ids:
            del self.open[request_id]
            self.ended.append(End(request_id))


def requests(*lengths: int) -> list[Request]:
    prompt = Prompt("p", "chat", "hello")
    return [Request(str(i), prompt, length, "off") for i, length in enumerate(lengths)]


def run(loop: Loop) -> Window:
    """To its end, at one go."""
    while True:
        try:
            next(loop)
        except StopIteration as end:
            return end.value


def closed(system: FakeSystem, requests: list[Request], streams: int, limit_s: float = FOREVER_S) -> Window:
    return run(closed_loop(system, requests, streams, limit_s, lambda: system.now_s))


def test_a_closed_loop_keeps_its_streams_busy_until_one_has_no_successor():
    system = FakeSystem()
    window = closed(system, requests(2, 4, 6, 3, 3, 3), 3)
    assert system.order == ["0", "1", "2", "3", "4", "5"]
    # 0 ends at 2 and 1 at 4, 3 (sent at 2) at 5, 2 at 6: by then 4 and 5 are open, and nothing is left to follow.
    assert (window.opened_s, window.closed_s) == (1.0, 6.0)
    assert set(system.open_at_polls[:6]) == {3}
    assert [answer.finished for answer in window.answers] == [True, True, True, True, False, False]
    assert not system.open


def test_the_window_counts_what_came_while_all_streams_were_busy():
    measured = measure(closed(FakeSystem(), requests(2, 4, 6, 3, 3, 3), 3))
    assert measured.tokens_per_s == pytest.approx(3.0)
    assert measured.accepted_length == pytest.approx(1 + 12 / 8)
    assert measured.tree_nodes == pytest.approx(24 / 8)
    assert measured.itl_ms_p50 == measured.itl_ms_p95 == pytest.approx(1000)


def test_a_slow_block_is_cut_at_its_limit():
    window = closed(FakeSystem(), requests(50, 50), 2, limit_s=0.0)
    assert [len(answer.token_ids) for answer in window.answers] == [1, 1]


def test_a_closed_loop_that_finds_no_room_says_so():
    with pytest.raises(QueueFullError, match="3 streams"):
        closed(FakeSystem(places=2), requests(3, 3, 3), 3)


def test_an_open_loop_sends_however_many_are_open_and_counts_refusals():
    system = FakeSystem(places=2)
    window = run(open_loop(system, requests(4, 4, 4), [0.0, 0.0, 0.0], lambda: system.now_s))
    assert len(system.order) == 3
    assert measure(Window(window.answers, 0.0, 10.0)).rejected == 1
    assert [len(answer.token_ids) for answer in window.answers] == [4, 4, 0]


def test_an_open_loop_waits_until_a_request_is_due():
    window = run(open_loop(FakeSystem(), requests(1, 1), [0.0, 0.05], time.perf_counter))
    first, second = (answer.sent_s for answer in window.answers)
    assert second - first == pytest.approx(0.05)
    assert window.opened_s == first


def test_latencies_are_counted_per_token_and_from_when_a_request_was_due():
    request = requests(5)[0]
    sent_before = Answer(request, 0.5, [1], [(1.5, 1), (2.5, 2)])
    sent_inside = Answer(request, 2.0, [1], [(2.2, 1), (2.3, 1), (9.0, 1)])
    measured = measure(Window([sent_before, sent_inside], opened_s=1.5, closed_s=3.5))
    assert measured.tokens_per_s == pytest.approx(4 / 2.0)
    assert measured.ttft_ms_p50 == pytest.approx(200)
    assert measured.itl_ms_p50 == pytest.approx(500)  # 0.5, 0.5, 0.1


def test_poisson_arrivals_repeat_with_their_seed_and_keep_their_rate():
    arrivals = poisson_arrivals(4.0, 20_000, seed=3)
    assert arrivals == poisson_arrivals(4.0, 20_000, seed=3)
    assert arrivals != poisson_arrivals(4.0, 20_000, seed=4)
    gaps = np.diff([0.0, *arrivals])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)  # an exponential's deviation is its mean
