"""`python -m tests.chaos [--minutes N] [--seed S] [--calm]`: break every part of a real deployment; compare every text.

All services run as processes with a tiny model, behind a proxy. Faults and clients follow from the seed (their times do
not). The first verifier, drafter and front door are never killed, only stopped and cut off: their memory is measured.
With `--calm` nothing is broken: a soak under the same clients.
The last line is "N passed, M failed"; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from tests.chaos.deployment import Deployment, Service, running
from tests.chaos.oracle import POLICIES, make_cases, read
from tests.chaos.workload import Clients, Tally
from treeline.client import TreelineClient
from treeline.v1 import drafting_pb2
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub

CASES, CLIENTS = 40, 10
FAULT_PAUSE_S = (0.5, 4.0)
FAULTS = ("kill", "kill", "drain", "pause", "delay", "hold", "cut")
LEAK_WAIT_S = 30.0
SLACK = 24
"""Descriptors or tasks more than a fresh process has: connections and watches that have not been collected yet."""
SAMPLE_S = 2.0
WARM_S, MEASURED_S = 120.0, 300.0
"""A process' caches fill for a while; a slope over less than five minutes is noise."""
MAX_MIB_PER_MINUTE = 1.0


class Breaker:
    """Breaks one thing after the other, several at a time where mending takes long."""

    def __init__(self, deployment: Deployment, seed: int) -> None:
        self._services, self._rng = deployment.services, random.Random(seed)
        self._stopping, self._mending = threading.Event(), []
        self.done: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return once everything is mended."""
        self._stopping.set()
        self._thread.join()
        for thread in self._mending:
            thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._rng.uniform(*FAULT_PAUSE_S)):
            service, fault = self._rng.choice(self._services), self._rng.choice(FAULTS)
            if fault in ("kill", "drain") and is_kept(service):
                fault = "cut"
            seconds, delay_s = self._rng.uniform(0.3, 4.0), self._rng.uniform(0.005, 0.2)
            if service.lock.acquire(blocking=False):  # else it is still broken
                self.done[f"{fault} {service.kind}"] += 1
                self._mending.append(threading.Thread(target=self._break, args=(service, fault, seconds, delay_s)))
                self._mending[-1].start()

    def _break(self, service: Service, fault: str, seconds: float, delay_s: float) -> None:
        try:
            if fault in ("kill", "drain"):
                service.end(signal.SIGKILL if fault == "kill" else signal.SIGTERM)
                service.start()
            elif fault == "pause":
                service.pause(seconds)
            elif fault == "cut":
                service.link.cut()
            elif fault == "hold":
                service.link.hold(True)
                time.sleep(seconds)
                service.link.hold(False)
            else:
                service.link.delay_s = delay_s
                time.sleep(seconds)
                service.link.delay_s = 0.0
        finally:
            service.lock.release()


class Memory:
    """Samples of the processes that are never killed."""

    def __init__(self, services: list[Service]) -> None:
        self._began_s, self._samples = time.monotonic(), {service: [] for service in services if is_kept(service)}
        self._stopping = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            for service, samples in self._samples.items():
                samples.append((time.monotonic() - self._began_s, service.resident_mib()))

    def check(self, tally: Tally) -> None:
        self._stopping.set()
        for service, samples in self._samples.items():
            seconds, mib = np.asarray([s for s in samples if s[0] > WARM_S] or samples[-2:]).T
            if seconds[-1] - seconds[0] < MEASURED_S:
                print(f"memory of {service.name}: {samples[0][1]:.0f} to {mib[-1]:.0f} MiB, too short for a slope")
                continue
            (slope, _), covariance = np.polyfit(seconds / 60, mib, 1, cov=True)
            shown = f"{slope:+.3f} MiB a minute (standard error {covariance[0, 0] ** 0.5:.3f})"
            print(f"memory of {service.name}: {mib[0]:.0f} to {mib[-1]:.0f} MiB, {shown}")
            tally.check("memory", f"{service.name}: {shown}" if slope > MAX_MIB_PER_MINUTE else "")


def is_kept(service: Service) -> bool:
    return service.kind != "planner" and service.name.endswith(" 0")


def leftovers(deployment: Deployment, fresh: dict[str, tuple[int, int]]) -> list[str]:
    """What idle services still hold."""
    found = []
    metadata = (("authorization", f"Bearer {deployment.secret}"),)
    for verifier in deployment.of("verifier"):
        with TreelineClient(verifier.link.endpoint, token=deployment.secret) as client:
            load = client.load()
        held = load.num_requests_running, load.num_requests_waiting, load.kv_blocks_used
        if any(held):
            found.append(f"{verifier.name} has {held} requests running, waiting, blocks in use")
    for drafter in deployment.of("drafter"):
        with grpc.insecure_channel(drafter.link.endpoint) as channel:
            ask = DraftingServiceStub(channel).GetDrafterInfo
            info = ask(drafting_pb2.GetDrafterInfoRequest(), timeout=10, metadata=metadata)
        if info.sessions or info.streams > len(deployment.of("verifier")):
            found.append(f"{drafter.name} has {info.sessions} sessions, {info.streams} streams")
    for service in deployment.services:
        now = service.descriptors(), service.tasks()
        if any(one > other + SLACK for one, other in zip(now, fresh[service.kind], strict=True)):
            found.append(f"{service.name} has {now} descriptors, tasks; fresh {fresh[service.kind]}")
    return found


def check_afterwards(deployment: Deployment, cases: list, tally: Tally, fresh: dict[str, tuple[int, int]]) -> None:
    deployment.until_ready()
    with deployment.client() as client:
        for number, case in enumerate(cases):
            policy = POLICIES[number % len(POLICIES)]
            tally.check("texts afterwards", case.problem(read(client.generate(**case.arguments, policy=policy))))
    deadline_s = time.monotonic() + LEAK_WAIT_S
    while (found := leftovers(deployment, fresh)) and time.monotonic() < deadline_s:
        time.sleep(1)
    tally.check("nothing left over", "; ".join(found))
    for service in deployment.services:
        tally.check("processes", "; ".join(service.problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm", action="store_true", help="break nothing")
    parser.add_argument("--folder", type=Path, help="for the services' logs; a temporary one by default")
    options = parser.parse_args()
    rng, tally = random.Random(options.seed), Tally()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="treeline-chaos-"))
    print(f"seed {options.seed}, logs in {folder}", flush=True)
    with running(folder, drafters=2, verifiers=3, doors=2) as deployment:
        first = deployment.of("verifier")[0]
        with TreelineClient(first.link.endpoint, token=deployment.secret) as undisturbed:
            cases = make_cases(rng, CASES, undisturbed)
        fresh = {service.kind: (service.descriptors(), service.tasks()) for service in deployment.services}
        memory, clients = Memory(deployment.services), Clients(deployment, cases, tally, options.seed)
        breaker = None if options.calm else Breaker(deployment, options.seed)
        clients.start(CLIENTS)
        end_s = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end_s:
            time.sleep(min(30, max(0, end_s - time.monotonic())))
            print(f"{sum(tally.passed.values())} passed, {len(tally.failures)} failed so far", flush=True)
        if breaker:
            breaker.stop()
        clients.stop()
        check_afterwards(deployment, cases, tally, fresh)
        memory.check(tally)
    print(f"faults: {dict(sorted(breaker.done.items())) if breaker else 'none'}")
    print(f"checked: {dict(sorted(tally.passed.items()))}")
    print(f"longest time without a token within a stream: {tally.longest_gap_s:.1f} s")
    print(f"{sum(tally.passed.values())} passed, {len(tally.failures)} failed")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
