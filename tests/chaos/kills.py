"""`python -m tests.chaos.kills KIND [--replicas R] [--kills N]`: kill -9 of one under 8 streams, N times.

Each kill meets all eight streams in mid-answer. Every text must be that of an undisturbed run, every token come once.
Shows the longest time without a token in any stream, and how long the killed service took to start again. The last line
is "N passed, M failed", counted in kills.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.chaos.deployment import Service, running
from tests.chaos.oracle import Answer, Case, read
from treeline.client import TreelineClient

STREAMS, TOKENS = 8, 200
"""Together they fit the cache of one verifier, so that none waits for blocks."""
BEGUN_TOKENS = 8
"""Of every stream when the kill comes, so that none is in the queue."""


def make_cases(client: TreelineClient) -> list[Case]:
    cases = []
    for seed in range(STREAMS):
        sampling = {"temperature": 0.8 * (seed % 2), "repetition_penalty": 1.1, "seed": seed}
        case = Case({"prompt": "one two three, one two three", "max_tokens": TOKENS, "ignore_eos": True} | sampling)
        case.expected = read(client.generate(**case.arguments, policy="off"))
        cases.append(case)
    return cases


class Reader:
    """One stream, read by a thread."""

    def __init__(self, case: Case) -> None:
        self._case, self.answer, self.longest_gap_s = case, Answer(), 0.0
        self.begun = threading.Event()

    def read(self, client: TreelineClient) -> str:
        """Returns what was wrong; empty if nothing."""
        last_s = time.monotonic()
        try:
            for message in client.generate(**self._case.arguments, timeout_s=240):
                now_s = time.monotonic()
                if self.answer.token_ids:
                    self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                last_s = now_s
                self.answer.take(message)
                if len(self.answer.token_ids) >= BEGUN_TOKENS:
                    self.begun.set()
        except Exception as error:
            return f"broken after {len(self.answer.token_ids)} tokens: {error}"
        finally:
            self.begun.set()
        return self._case.problem(self.answer)


def kill_once(client: TreelineClient, cases: list[Case], victim: Service) -> tuple[list[str], float, bool]:
    """The problems, the longest gap, and whether the kill met all streams in mid-answer."""
    readers = [Reader(case) for case in cases]
    with ThreadPoolExecutor(STREAMS) as pool:
        reading = [pool.submit(reader.read, client) for reader in readers]
        for reader in readers:
            reader.begun.wait()
        met = not any(reader.answer.completes for reader in readers)
        victim.end(signal.SIGKILL)
        victim.start()
        problems = [problem for each in reading if (problem := each.result())]
    return problems, max(reader.longest_gap_s for reader in readers), met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("verifier", "door"))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=100)
    options = parser.parse_args()
    replicas = {"verifiers": 1, "doors": 1} | {f"{options.kind}s": options.replicas}
    gaps_s, starts_s, broken, kills, rng = [], [], 0, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), drafters=1, **replicas) as deployment:
        with TreelineClient(deployment.of("verifier")[0].link.endpoint, token=deployment.secret) as undisturbed:
            cases = make_cases(undisturbed)
        with deployment.client() as client:
            while kills < options.kills:
                deployment.until_ready()
                victim = rng.choice(deployment.of(options.kind))
                problems, gap_s, met = kill_once(client, cases, victim)
                if not met and not problems:
                    continue  # it came too late to prove anything
                kills, broken = kills + 1, broken + bool(problems)
                gaps_s.append(gap_s)
                starts_s.append(victim.started_s)
                print(f"kill {kills} of {victim.name}: longest gap {gap_s:.2f} s, start {victim.started_s:.2f} s")
                print("\n".join(problems), end="\n" if problems else "", flush=True)
    for name, values in (("longest gap", gaps_s), ("start", starts_s), ("gap - start", np.subtract(gaps_s, starts_s))):
        print(f"{name}: median {np.median(values):.2f} s, longest {np.max(values):.2f} s")
    print(f"{kills - broken} passed, {broken} failed")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
