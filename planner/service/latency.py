"""Measured latency from Prometheus. Every value has an age and is dropped when too old; nothing waits for one."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT_S = 1.0
"""Of one query, however slowly its answer arrives: the signals' own interval."""
WINDOW = "15s"
"""Of a quantile: seven scrapes at the 2 s that deploy/prometheus sets, so that one or two may fail."""
MAX_ANSWER_BYTES = 1 << 20
"""An answer has one sample, a few hundred bytes; a server that sends a megabyte is not Prometheus."""
_ITL = "treeline_inter_token_latency_seconds"
_PHASE = "treeline_step_phase_seconds"
_RUNNING = "treeline_num_requests_running"


class Latency:
    """The newest measurements of one verifier: itl_p95_s and verify_p50_s (seconds), running (requests).

    Used on the planner's event loop alone; `read_prometheus` may run elsewhere.
    """

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._values: dict[str, tuple[float, float]] = {}  # (value, when it was set)

    def get(self, name: str) -> float | None:
        """The value, or None if there is none that is fresh."""
        return self._values[name][0] if self.age_s(name) <= self._max_age_s else None

    def age_s(self, name: str) -> float:
        """Seconds since the value was set; infinite if it never was."""
        return time.monotonic() - self._values[name][1] if name in self._values else math.inf

    def update(self, values: dict[str, float]) -> None:
        now_s = time.monotonic()
        self._values.update({name: (value, now_s) for name, value in values.items()})


def read_prometheus(url: str, instance: str) -> dict[str, float]:
    """What a Prometheus server has measured of one verifier; blocks up to TIMEOUT_S per value.

    Args:
        instance: the verifier's metrics page as host:port.

    Raises:
        OSError: it cannot be reached or does not answer in time.
        ValueError: it answers something else.
    """
    where = f'instance="{instance}"'
    verify = f'{where},phase="verify"'
    queries = {
        "itl_p95_s": f"histogram_quantile(0.95, sum by (le) (rate({_ITL}_bucket{{{where}}}[{WINDOW}])))",
        "verify_p50_s": f"histogram_quantile(0.5, sum by (le) (rate({_PHASE}_bucket{{{verify}}}[{WINDOW}])))",
        "running": f"{_RUNNING}{{{where}}}",
    }
    found = {name: _query(url, query) for name, query in queries.items()}
    return {name: value for name, value in found.items() if value is not None}


def _query(url: str, query: str) -> float | None:
    answer = json.loads(_get(f"{url.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    try:
        results = answer["data"]["result"]
        value = float(results[0]["value"][1]) if results else math.nan
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"not an answer of the Prometheus query API: {str(answer)[:100]}") from None
    return value if math.isfinite(value) else None


def _get(url: str) -> bytes:
    deadline_s, body = time.monotonic() + TIMEOUT_S, b""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            while len(body) < MAX_ANSWER_BYTES and (chunk := response.read1()):
                body += chunk
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{url} did not answer in {TIMEOUT_S} s")
        return body
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}") from None
    except http.client.HTTPException as error:
        raise ValueError(f"{url} does not speak HTTP: {type(error).__name__}") from None
