"""Live signals from Prometheus, or from a service's own metrics page where there is no Prometheus.

Every signal has an age and is dropped when it is too old; nobody ever waits for one.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from prometheus_client.metrics_core import Sample
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 1.0
"""Of one query, however little of its answer arrives at a time."""
WINDOW = "15s"
MAX_PAGE_BYTES = 4 << 20
CHUNK_BYTES = 1 << 16
_ITL = "treeline_inter_token_latency_seconds"
_PHASE = "treeline_step_phase_seconds"
_RUNNING = "treeline_num_requests_running"

Buckets = dict[float, float]
"""Cumulative counts by upper bound."""


@dataclass(frozen=True)
class _Value:
    value: float
    read_s: float


class Signals:
    """The newest value of each signal of one verifier: itl_p50_s, itl_p95_s, verify_p50_s (seconds), running."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._values: dict[str, _Value] = {}
        self._page: dict[str, Buckets] = {}

    def get(self, name: str) -> float | None:
        """A signal's value, or None if there is none that is fresh."""
        found = self._values.get(name)
        return found.value if found is not None and self.age_s(name) <= self._max_age_s else None

    def age_s(self, name: str) -> float:
        """Seconds since a signal was read; infinite if it never was."""
        found = self._values.get(name)
        return time.monotonic() - found.read_s if found else math.inf

    def set(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self._values[name] = _Value(value, time.monotonic())

    def read_prometheus(self, url: str, instance: str) -> None:
        """Query a Prometheus server; `instance` is the verifier's metrics page as host:port. Blocks up to a few s.

        Raises:
            OSError: it cannot be reached or does not answer in time.
            ValueError: it answers something else.
        """
        where = f'instance="{instance}"'
        verify = f'{where},phase="verify"'
        queries = {
            "itl_p50_s": f"histogram_quantile(0.5, sum by (le) (rate({_ITL}_bucket{{{where}}}[{WINDOW}])))",
            "itl_p95_s": f"histogram_quantile(0.95, sum by (le) (rate({_ITL}_bucket{{{where}}}[{WINDOW}])))",
            "verify_p50_s": f"histogram_quantile(0.5, sum by (le) (rate({_PHASE}_bucket{{{verify}}}[{WINDOW}])))",
            "running": f"{_RUNNING}{{{where}}}",
        }
        for name, query in queries.items():
            value = _query(url, query)
            if value is not None:
                self.set(name, value)

    def read_page(self, url: str) -> None:
        """Read a service's own metrics page; quantiles are of what came since the page was last read.

        Raises:
            OSError, ValueError: as for read_prometheus.
        """
        histograms: dict[str, Buckets] = {_ITL: {}, _PHASE: {}}
        for sample in _samples(_get(url).decode()):
            if sample.name == _RUNNING:
                self.set("running", sample.value)
            name = sample.name.removesuffix("_bucket")
            if name in histograms and sample.name != name and sample.labels.get("phase", "verify") == "verify":
                histograms[name][float(sample.labels.get("le", "nan"))] = sample.value
        for name, signal, q in ((_ITL, "itl_p50_s", 0.5), (_ITL, "itl_p95_s", 0.95), (_PHASE, "verify_p50_s", 0.5)):
            since = self._page.get(name, {})
            value = quantile({bound: n - since.get(bound, 0.0) for bound, n in histograms[name].items()}, q)
            if value is not None and since:
                self.set(signal, value)
        self._page = histograms


def quantile(buckets: Buckets, q: float) -> float | None:
    """The q-quantile of a cumulative histogram, linear within a bucket as Prometheus does it; None if it is empty."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    rank, below, lower = q * total, 0.0, 0.0
    for bound in bounds:
        count = buckets[bound]
        if count >= rank:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
        below, lower = count, bound
    return lower


def _query(url: str, query: str) -> float | None:
    answer = json.loads(_get(f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    try:
        results = answer["data"]["result"]
        value = float(results[0]["value"][1]) if results else math.nan
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"not an answer of the Prometheus query API: {str(answer)[:100]}") from None
    return value if math.isfinite(value) else None


def _samples(text: str) -> list[Sample]:
    try:
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except Exception as error:  # the parser has no one error for what is no metrics page
        raise ValueError(f"not a metrics page: {error}") from None


def _get(url: str) -> bytes:
    deadline_s = time.monotonic() + TIMEOUT_S
    body = b""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            while len(body) < MAX_PAGE_BYTES and (chunk := response.read1(CHUNK_BYTES)):
                body += chunk
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{url} did not answer in {TIMEOUT_S} s")
        return body
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}") from None
    except http.client.HTTPException as error:
        raise ValueError(f"{url} does not speak HTTP: {type(error).__name__}") from None
