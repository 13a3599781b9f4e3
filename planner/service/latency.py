"""Measured latency of each verifier: from Prometheus, or from step records where Prometheus has nothing recent."""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Iterable
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treeline.step_record import StepRecord

if TYPE_CHECKING:
    import aiohttp

TIMEOUT_S = 1.0
"""Longest duration of one query: the interval between queries."""
WINDOW_S = 5.0
"""Window of a quantile: five scrapes at the 1 s that deploy/prometheus sets, so that three may fail."""
PAUSE_S = 1.0
"""A verifier without tokens for this long is not busy: the scrape interval."""
LATE_S = 3.0
"""Age of a late value: three missed queries. The controller compares values with present steps, so old ones mislead."""
MAX_ANSWER_BYTES = 1 << 20
"""Bytes of one answer: 5,000 replicas at about 200 bytes each."""
QUERIES = {
    "inter_token_p95": "treeline:inter_token_latency_seconds:p95",
    "time_to_first_token_p95": "treeline:time_to_first_token_seconds:p95",
    "verify_p50": "treeline:verify_seconds:p50",
    "running": "treeline_num_requests_running",
}
"""One per signal, of all replicas at once; the first three are recording rules of deploy/prometheus/rules.yml."""
PROMETHEUS, STEPS = "prometheus", "steps"

Readings = dict[str, tuple[float, float]]
"""Each signal's value, and when it was measured."""


def of_class(name: str, priority: int | None) -> str:
    """The name of a signal of the requests of one priority; None: of all requests."""
    return name if priority is None else f"{name}_priority_{priority}"


class PrometheusError(Exception):
    """Prometheus cannot be used; the message says why."""


class Reading(NamedTuple):
    """A signal as of now. `value`: None if there is no recent one."""

    value: float | None
    age_s: float
    source: str


class Latency:
    """The newest measurements of one verifier by source; times are seconds of the caller's clock."""

    def __init__(self) -> None:
        self._readings: dict[str, Readings] = {PROMETHEUS: {}, STEPS: {}}

    def update(self, source: str, readings: Readings) -> None:
        self._readings[source].update(readings)

    def newest(self, name: str, now_s: float, max_age_s: float) -> Reading:
        """Prometheus' value, or the newest of any source if Prometheus is late; no value if that is too old."""
        found = []
        for source, readings in self._readings.items():
            value, at_s = readings.get(name, (math.nan, -math.inf))
            age_s = now_s - at_s
            found.append(Reading(value if age_s <= max_age_s else None, age_s, source))
        measured = found[0]
        return measured if measured.age_s <= LATE_S else min(found, key=lambda reading: reading.age_s)


class StepQuantiles:
    """The same quantiles as Prometheus', from one verifier's step records over the same seconds."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, StepRecord]] = deque()
        self._busy_since_s = self._last_s = -math.inf

    def observe(self, record: StepRecord, now_s: float) -> None:
        if record.gaps or record.first_token_s:
            self._steps.append((now_s, record))
            if now_s - self._last_s > PAUSE_S:
                self._busy_since_s = now_s
            self._last_s = now_s

    def busy(self, now_s: float) -> bool:
        """Whether tokens have come for two windows without a pause, so that Prometheus must have seen them."""
        return now_s - self._last_s < PAUSE_S and now_s - self._busy_since_s > 2 * WINDOW_S

    def quantiles(self, now_s: float, priorities: Iterable[int] = ()) -> Readings:
        """The 95th percentiles over the last WINDOW_S, each measured when its newest value came, of all requests and of
        those of each of `priorities`.

        `inter_token_p95` counts every token: the tokens of a step share its gap equally. `step_p95` weights the seconds
        of steps by the same tokens, so that the two compare.
        """
        while self._steps and now_s - self._steps[0][0] > WINDOW_S:
            self._steps.popleft()
        found: Readings = {}
        gaps = np.asarray(
            [
                (*gap, at_s, record.step_s, priority)
                for at_s, record in self._steps
                for gap, priority in zip(record.gaps, record.gap_priority or repeat(0), strict=False)
            ]
        ).reshape(-1, 5)
        firsts = np.asarray(
            [
                (first_s, at_s, priority)
                for at_s, record in self._steps
                for first_s, priority in zip(
                    record.first_token_s, record.first_token_priority or repeat(0), strict=False
                )
            ]
        ).reshape(-1, 3)
        for priority in (None, *priorities):
            mine = gaps if priority is None else gaps[gaps[:, -1] == priority]
            if len(mine):
                seconds, tokens, times_s, steps_s, _ = mine.T
                found[of_class("inter_token_p95", priority)] = _p95(seconds / tokens, tokens), float(times_s[-1])
                found[of_class("step_p95", priority)] = _p95(steps_s, tokens), float(times_s[-1])
            mine = firsts if priority is None else firsts[firsts[:, -1] == priority]
            if len(mine):
                value = _p95(mine[:, 0], np.ones(len(mine)))
                found[of_class("time_to_first_token_p95", priority)] = value, float(mine[-1, 1])
        return found


def _p95(values: np.ndarray, weights: np.ndarray) -> float:
    order = values.argsort()
    reached = weights[order].cumsum()
    return float(values[order][reached.searchsorted(0.95 * reached[-1])])


async def read_prometheus(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, float]]:
    """Every fresh signal of every replica, by its metrics page as host:port; takes TIMEOUT_S at most.

    A value that is not a number (nothing was observed) is left out.

    Raises:
        PrometheusError: the server is dead or slow, or its answer is malformed or impossible.
    """
    import aiohttp

    try:
        async with asyncio.timeout(TIMEOUT_S):
            answers = await asyncio.gather(*(_query(session, url, query) for query in QUERIES.values()))
    except TimeoutError:
        raise PrometheusError(f"{url} did not answer in {TIMEOUT_S:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise PrometheusError(f"{url} cannot be reached ({type(error).__name__})") from None
    found: dict[str, dict[str, float]] = {}
    for name, answer in zip(QUERIES, answers, strict=True):
        for instance, value in answer:
            if value < 0 or math.isinf(value):
                raise PrometheusError(f"{url} gives an impossible {name}")
            if not math.isnan(value):
                found.setdefault(instance, {})[name] = value
    return found


async def measure_all(url: str) -> dict[str, dict[str, float]]:
    """`read_prometheus`, with a session of its own."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        return await read_prometheus(session, url)


async def _query(session: aiohttp.ClientSession, url: str, query: str) -> Iterable[tuple[str, float]]:
    """(host:port, value) of each series that the query finds."""
    body = b""
    async with session.get(f"{url.rstrip('/')}/api/v1/query", params={"query": query}) as response:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise PrometheusError(f"{url} sends too long an answer")
        if response.status != 200:
            raise PrometheusError(f"{url} answers {response.status}")
    try:
        series: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return [(str(one["metric"]["instance"]), float(one["value"][1])) for one in series]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise PrometheusError(f"{url} does not answer as Prometheus does") from None
