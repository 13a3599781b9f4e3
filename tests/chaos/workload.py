"""Clients of all kinds: they read, slowly or not at all, cancel, run out of time, ask wrongly or all at once."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable

import grpc

from tests.chaos.deployment import Deployment
from tests.chaos.oracle import POLICIES, Answer, Case
from treeline.client import TreelineClient
from treeline.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    StreamLostError,
    TreelineError,
    UnavailableError,
    UnknownModelError,
)
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

HANG_S = 240.0
"""No answer takes as long: resuming waits 120 s."""
BURST = 100
"""Requests at once: more than two or three verifiers run and let wait."""
WRONG: list[dict] = [
    {"temperature": -1.0},
    {"top_p": 2.0},
    {"max_tokens": 0},
    {"max_tokens": 100_000},
    {"policy": "nonsense"},
    {"policy": "static:999999-999999"},
    {"priority": 99},
    {"stop": [""]},
    {"logit_bias": {100_000: 1.0}},
    {"logprobs": 1000},
    {"grammar": pb.Grammar(regex="(((")},
    {"grammar": pb.Grammar(json_schema="[" * 5000)},
    {"prompt": "x" * 600},
    {"prompt": "x" * 3_000_000},
    {"prompt": None, "token_ids": [2**32 - 1]},
    {"prompt": None, "messages": [{"role": "nobody" * 9, "content": "x"}] * 300},
]


class Tally:
    """What was checked, by kind, and what was wrong."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.passed: Counter[str] = Counter()
        self.failures: list[str] = []
        self.longest_gap_s = 0.0

    def check(self, what: str, problem: str) -> None:
        with self._lock:
            if problem:
                self.failures.append(f"{what}: {problem}")
                print(f"FAILED {what}: {problem}", flush=True)
            else:
                self.passed[what] += 1

    def gap(self, seconds: float) -> None:
        with self._lock:
            self.longest_gap_s = max(self.longest_gap_s, seconds)


class Clients:
    """Each thread is one client at a time, of a kind drawn from the seed."""

    def __init__(self, deployment: Deployment, cases: list[Case], tally: Tally, seed: int) -> None:
        self._deployment, self._cases, self._tally, self._seed = deployment, cases, tally, seed
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        kinds = [self.reads, self.reads, self.reads, self.reads_slowly, self.leaves, self.is_late]
        kinds += [self.aborts, self.asks_wrongly]
        self._run(self._keep(2, [self.come_all_at_once], pause_s=20))
        for number in range(count):
            self._run(self._keep(10 + number, kinds, pause_s=0))

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(HANG_S + 60)
            self._tally.check("clients that ended", "" if not thread.is_alive() else "one hangs")

    def reads(self, client: TreelineClient, rng: random.Random, slow: float = 0.0) -> None:
        case, answer = rng.choice(self._cases), Answer()
        problem, last_s = "", time.monotonic()
        policy = rng.choice(POLICIES)
        try:
            for message in client.generate(**case.arguments, policy=policy, timeout_s=HANG_S):
                if answer.token_ids and not slow:
                    self._tally.gap(time.monotonic() - last_s)
                answer.take(message)
                time.sleep(slow * rng.random())
                last_s = time.monotonic()
        except StreamLostError as error:  # what it means to lose three verifiers in a row (docs/operations.md)
            wrong = case.problem(answer) or (error.delivered_tokens != len(answer.token_ids) and "miscounted")
            self._tally.check("given up after three lost verifiers", wrong or "")
            return
        except (QueueFullError, UnavailableError) as error:
            if answer.token_ids:
                problem = f"broken after {len(answer.token_ids)} tokens: {error}"
        if not answer.completes and not problem:
            self._tally.check("refused before their first token", case.problem(answer))
        else:
            self._tally.check("whole texts", problem or case.problem(answer))

    def reads_slowly(self, client: TreelineClient, rng: random.Random) -> None:
        self.reads(client, rng, slow=0.2)

    def leaves(self, client: TreelineClient, rng: random.Random) -> None:
        """Cancels, or vanishes with its connection."""
        case, answer = rng.choice(self._cases), Answer()
        own = self._deployment.client() if rng.random() < 0.5 else client
        stream = own.generate(**case.arguments, timeout_s=HANG_S)
        try:
            for _ in range(rng.randint(0, 20)):
                answer.take(next(stream))
        except (QueueFullError, UnavailableError, StopIteration):
            pass
        stream.close()  # type: ignore[attr-defined]
        if own is not client:
            own.close()
        self._tally.check("texts left early", case.problem(answer))

    def is_late(self, client: TreelineClient, rng: random.Random) -> None:
        case, answer, problem = rng.choice(self._cases), Answer(), ""
        timeout_s = rng.uniform(0.001, 1.0)
        began_s = time.monotonic()
        try:
            for message in client.generate(**case.arguments, timeout_s=timeout_s):
                answer.take(message)
        except (QueueFullError, UnavailableError):
            pass
        except RequestFailedError as error:
            problem = "" if error.code == "DEADLINE_EXCEEDED" else str(error)
        late_s = time.monotonic() - began_s - timeout_s
        problem = problem or (f"ended {late_s:.1f} s behind its deadline" if late_s > 5 else "")
        self._tally.check("texts until a deadline", problem or case.problem(answer))

    def aborts(self, client: TreelineClient, rng: random.Random) -> None:
        case, answer, request_id = rng.choice(self._cases), Answer(), uuid.uuid4().hex
        stop_at = rng.randint(1, 30)
        try:
            for count, message in enumerate(client.generate(**case.arguments, request_id=request_id, timeout_s=HANG_S)):
                answer.take(message)
                if count == stop_at:
                    with contextlib.suppress(UnavailableError):  # no front door can be reached: the answer goes on
                        client.abort(request_id)
        except (QueueFullError, UnavailableError) as error:
            self._tally.check("aborts", f"broken: {error}" if answer.token_ids and "abort" not in str(error) else "")
        self._tally.check("texts aborted", case.problem(answer))

    def asks_wrongly(self, client: TreelineClient, rng: random.Random) -> None:
        arguments = {"prompt": "x", "max_tokens": 300} | rng.choice(WRONG)
        problem = "was answered"
        try:
            for _ in client.generate(**arguments, timeout_s=HANG_S):
                pass
        except (InvalidRequestError, UnknownModelError, UnavailableError):
            problem = ""
        except TreelineError as error:
            problem = f"{type(error).__name__}: {error}"
        shown = str(arguments)[:60]
        self._tally.check("wrong requests refused", problem and f"{shown} {problem}")

    def come_all_at_once(self, client: TreelineClient, rng: random.Random) -> None:
        """Not with our client, so a front door that dies ends their streams."""
        allowed = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
        with grpc.insecure_channel(rng.choice(self._deployment.of("door")).link.endpoint) as channel:
            stub = GenerationServiceStub(channel)
            cases = [rng.choice([case for case in self._cases if _is_plain(case)]) for _ in range(BURST)]
            calls = [(case, stub.Generate(_message(case), timeout=HANG_S)) for case in cases]
            for case, call in calls:
                answer, problem = Answer(), ""
                try:
                    for response in call:
                        answer.take(getattr(response, response.WhichOneof("response")))
                except grpc.RpcError as error:
                    # A connection that is reset is INTERNAL, without details of ours.
                    ours = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
                    if error.code() not in allowed or (ours and error.code() is grpc.StatusCode.INTERNAL):
                        problem = f"{error.code().name}: {error.details()}"
                    self._tally.check("refused or cut in a burst", problem or case.problem(answer))
                else:
                    self._tally.check("whole texts of a burst", case.problem(answer))

    def _run(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()

    def _keep(self, number: int, kinds: list[Callable], pause_s: float) -> Callable[[], None]:
        def run() -> None:
            rng = random.Random(f"{self._seed} {number}")
            with self._deployment.client() as client:
                while not self._stopping.wait(pause_s):
                    kind = rng.choice(kinds)
                    try:
                        kind(client, rng)
                    except Exception as error:  # every surprise is a failure, and the client goes on
                        self._tally.check(kind.__name__, f"{type(error).__name__}: {error}")
                    self._stopping.wait(rng.uniform(0, 0.5))

        return run


def _is_plain(case: Case) -> bool:
    return not case.arguments.keys() & {"stop", "stop_token_ids", "grammar", "logprobs", "logit_bias"}


def _message(case: Case) -> pb.GenerateRequest:
    given = dict(case.arguments)
    request = pb.GenerateRequest(prompt=given.pop("prompt"), priority=given.pop("priority", 0))
    request.stopping.max_tokens = given.pop("max_tokens")
    for name, value in given.items():
        setattr(request.sampling, name, value)
    return request
