"""Latency objectives on the real service: is one held while the load steps, and while Prometheus is away?

Three services take the same steps of load, STREAMS, each in a closed loop for some seconds: `plain` decodes without
trees, `free` has trees and no objective, `held` has trees and an objective of SLACK times plain's p95 at REFERENCE
streams. A last step, `outage`, is as held with the most streams, and Prometheus is stopped for its middle third.
Drafts have a given acceptance: with those of the default drafter, steps at 4 streams have hardly a tree.

Every p95 is the 95th percentile of inter-token latency; the tokens of a chunk share its gap equally. The report holds

- `rows`, one for each step of each arm: `arm`; `streams`; `objective_ms`;
  `p95_ms_clients`, `p95_ms_prometheus`: by arrivals at clients, and the median of Prometheus' values, both in the
  second half of the step; `settled_s`: seconds into the step from which clients' p95 stays within TOLERANCE times the
  objective, null if it does not; `swings`: reversals of clients' p95 after that, by a tenth of the objective or more.
- `seconds`, about one for each second: `arm`, `streams`; `at_s`: into the step; `p95_ms_clients`,
  `p95_ms_prometheus`: over the 5 s before, null without tokens or an answer; `source`: of the p95 that the plan rests
  on; `step_budget_ms`: null for none; `out_of_reach`: the plan says that even plain decoding is too slow.
- `outage`: `fallback_s`, `return_s`: seconds after Prometheus' stop, and its start, until plans rest on step records,
  and on Prometheus again; null if they did not.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.common import Prompt
from bench.load import Answer, Request, System, Window, closed_loop, measure
from bench.service.synthetic_drafter import synthetic_drafter
from bench.synthetic import Acceptance
from bench.systems import RemoteSystem
from deploy.local_prometheus import LocalPrometheus
from planner.service.latency import PROMETHEUS, STEPS, WINDOW_S, PrometheusError, measure_all
from planner.service.objectives import INTER_TOKEN
from treeline.client import TreelineClient
from treeline.config import Config, ObjectivesConfig
from treeline.errors import ConfigError
from treeline.rpc.tokens import read_tokens
from treeline.v1 import generation_pb2 as pb

STREAMS, REFERENCE = (1, 16, 4), 4
SLACK, TOLERANCE = 1.3, 1.1
SAMPLE_S = 1.0
"""Between samples: the interval of scrapes."""
REQUESTS_PER_S = 10
"""More than one stream completes, so that no stream runs out of requests."""
OFF = "off"

Row = dict[str, Any]
Acts = Sequence[tuple[float, Callable[[], None]]]
"""What to do, each so many seconds into a step."""


@dataclass(frozen=True)
class Service:
    """A running service: what takes its requests, what asks for its first verifier's plan, and its Prometheus."""

    system: System
    plan: Callable[[], pb.VerifierPlan]
    prometheus: LocalPrometheus


@dataclass(frozen=True)
class Step:
    """A step of the load, measured. `p95_ms`: clients', in its second half; `named`, `seconds`: as in the report."""

    named: Row
    answers: list[Answer]
    length_s: float
    p95_ms: float | None
    seconds: list[Row]

    def row(self, objective_ms: float) -> Row:
        """As in the report."""
        late = [s["p95_ms_prometheus"] for s in self.seconds if s["at_s"] > self.length_s / 2]
        told_ms = [ms for ms in late if ms is not None]
        seen = [(s["at_s"], s["p95_ms_clients"]) for s in self.seconds if s["p95_ms_clients"] is not None]
        settled = settled_s(seen, TOLERANCE * objective_ms)
        return {
            **self.named,
            "objective_ms": objective_ms,
            "p95_ms_clients": self.p95_ms,
            "p95_ms_prometheus": median(told_ms) if told_ms else None,
            "settled_s": settled,
            "swings": swings([ms for at_s, ms in seen if at_s >= (settled or 0)], (TOLERANCE - 1) * objective_ms),
        }


def settled_s(seen: Sequence[tuple[float, float]], most: float) -> float | None:
    """The time of the first of (time, value) from which no value exceeds `most`; None if the last one does."""
    settled: float | None = None
    for at_s, value in seen:
        if value > most:
            settled = None
        elif settled is None:
            settled = at_s
    return settled


def swings(values: Sequence[float], least: float) -> int:
    """How often the values reverse; rises and falls of less than `least` do not count."""
    turns, rising, low, high = 0, None, math.inf, -math.inf
    for value in values:
        low, high = min(low, value), max(high, value)
        if rising is not False and high - value >= least:
            turns, rising, low = turns + (rising is True), False, value
        elif rising is not True and value - low >= least:
            turns, rising, high = turns + (rising is False), True, value
    return turns


def delay_s(seconds: Sequence[Row], since_s: float, source: str) -> float | None:
    """Seconds after `since_s` until a plan rests on `source`; None if none does."""
    return next((s["at_s"] - since_s for s in seconds if s["at_s"] >= since_s and s["source"] == source), None)


def run_objectives(
    config: Config,
    prompts: Sequence[Prompt],
    seconds: float,
    max_tokens: int,
    acceptance: Acceptance | None,
    report: Callable[[str], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Start the service for each arm, each step of the load `seconds` long.

    Args:
        acceptance: of the drafts; None for those of the drafter that `config` describes.

    Returns the report's rows, and what else it holds.

    Raises:
        ConfigError: a service does not start, no `prometheus` is on PATH, or `seconds` bring no tokens.
    """
    if shutil.which("prometheus") is None:
        raise ConfigError("no program `prometheus` on PATH")
    shuffled = random.Random(0).sample(prompts, len(prompts))
    smart, steps = config.verifier.default_policy, list[Step]()

    def load(service: Service, arm: str, streams: Sequence[int], policy: str, acts: Acts = ()) -> None:
        for count in streams:
            report(f"{arm}, {count} streams")
            chosen = [shuffled[i % len(shuffled)] for i in range(math.ceil(count * seconds * REQUESTS_PER_S))]
            requests = [Request(uuid.uuid4().hex, prompt, max_tokens, policy) for prompt in chosen]
            steps.append(_step(service, {"arm": arm, "streams": count}, requests, seconds, acts))

    with started(configured(config, None), report) as service:
        load(service, "plain", STREAMS, OFF)
    reference_ms = steps[STREAMS.index(REFERENCE)].p95_ms
    if reference_ms is None:
        raise ConfigError("no tokens came in the second half of a step: give it more seconds")
    objective_ms, stop_s, start_s = SLACK * reference_ms, seconds / 3, 2 * seconds / 3
    with ExitStack() as stack:
        if acceptance is not None:
            answers = [answer for step in steps for answer in step.answers]
            endpoint = stack.enter_context(synthetic_drafter(config, acceptance, answers))
            drafter = config.drafter.model_copy(update={"endpoints": [endpoint]})
            config = config.model_copy(update={"drafter": drafter})
        with started(configured(config, None), report) as service:
            load(service, "free", STREAMS, smart)
        with started(configured(config, objective_ms), report) as service:
            load(service, "held", STREAMS, smart)
            acts = (stop_s, service.prometheus.stop), (start_s, service.prometheus.restart)
            load(service, "outage", (max(STREAMS),), smart, acts)
    last = steps[-1].seconds
    outage = {"fallback_s": delay_s(last, stop_s, STEPS), "return_s": delay_s(last, start_s, PROMETHEUS)}
    by_second = [second for step in steps for second in step.seconds]
    return [step.row(objective_ms) for step in steps], {"outage": outage, "seconds": by_second}


def configured(config: Config, objective_ms: float | None) -> Config:
    """`config` with a Prometheus of its own, this objective alone, and slots for all streams."""
    slots = max(*STREAMS, config.limits.max_running_requests)
    objectives = ObjectivesConfig(inter_token_p95_ms=objective_ms)
    return config.model_copy(
        update={
            "limits": config.limits.model_copy(update={"max_running_requests": slots}),
            "metrics": config.metrics.model_copy(update={"prometheus": "auto"}),
            "planner": config.planner.model_copy(update={"objectives": objectives, "prometheus_url": None}),
        }
    )


@contextmanager
def started(config: Config, report: Callable[[str], None]) -> Iterator[Service]:
    """The whole service on Ray Serve, for as long as the block runs."""
    from deploy.run import run

    app, server = run(config, block=False, report=report), config.server
    try:
        if app.prometheus is None:
            raise ConfigError("this service can have no Prometheus of its own")
        token = read_tokens(server.token_file)[0] if server.token_file else None
        with TreelineClient(app.endpoint, token, server.tls.certificate if server.tls else None) as client:
            yield Service(RemoteSystem(client, max(STREAMS)), lambda: client.plans()[0], app.prometheus)
    finally:
        app.stop()


def _step(service: Service, named: Row, requests: Sequence[Request], seconds: float, acts: Acts) -> Step:
    begun_s, over, samples = time.monotonic(), threading.Event(), list[Row]()
    sampler = threading.Thread(target=_sample, args=(service, over, samples, acts))
    sampler.start()
    loop = closed_loop(service.system, requests, named["streams"], seconds, time.monotonic)
    try:
        while True:
            next(loop)
    except StopIteration as end:
        window: Window = end.value
    finally:
        over.set()
        sampler.join()
    for sample in samples:
        until_s = sample["at_s"]
        sample["p95_ms_clients"] = measure(Window(window.answers, until_s - WINDOW_S, until_s)).itl_ms_p95
        sample["at_s"] -= begun_s
    length_s = window.closed_s - begun_s
    second_half = Window(window.answers, begun_s + length_s / 2, window.closed_s)
    return Step(
        named, window.answers, length_s, measure(second_half).itl_ms_p95, [named | sample for sample in samples]
    )


def _sample(service: Service, over: threading.Event, samples: list[Row], acts: Acts) -> None:
    """Add what Prometheus and the plan say, about once a second, and act when it is time."""
    begun_s, due = time.monotonic(), list(acts)
    while not over.wait(SAMPLE_S):
        if due and time.monotonic() - begun_s >= due[0][0]:
            due.pop(0)[1]()
        told: list[float] = []
        with suppress(PrometheusError):
            told = [
                v[INTER_TOKEN] for v in asyncio.run(measure_all(service.prometheus.url)).values() if INTER_TOKEN in v
            ]
        plan = service.plan()
        samples.append(
            {
                "at_s": time.monotonic(),
                "p95_ms_prometheus": 1000 * max(told) if told else None,
                "source": next((signal.source for signal in plan.signals if signal.name == INTER_TOKEN), ""),
                "step_budget_ms": 1000 * plan.step_budget_s if plan.HasField("step_budget_s") else None,
                "out_of_reach": "out of reach" in plan.reason,
            }
        )
