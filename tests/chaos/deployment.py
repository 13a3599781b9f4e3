"""A deployment whose services are processes behind a proxy, to be broken on purpose."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.process import FORKS, prepare, run
from tests.chaos.proxy import Link, Proxy
from treeline.client import TreelineClient

TERM_S = 20.0
"""A drained process has ended by then; an idle machine needs 1 s."""


class Service:
    """A place in the deployment: its process may change, its address does not."""

    def __init__(self, kind: str, number: int, link: Link, folder: Path, found: list[Link]) -> None:
        self.kind, self.name, self.link = kind, f"{kind} {number}", link
        self._folder, self._found = folder, found
        self._process, self._pipe = FORKS.Process(), FORKS.Pipe()[0]
        self.problems: list[str] = []
        self.started_s = 0.0  # how long the last start took
        self.lock = threading.Lock()  # whoever breaks this service holds it

    def start(self) -> None:
        began_s = time.monotonic()
        self._pipe, far_end = FORKS.Pipe()
        log, found = self._folder / f"{self.name.replace(' ', '-')}.log", [link.endpoint for link in self._found]
        self._process = FORKS.Process(target=run, args=(self.kind, self._folder, found, far_end, log), daemon=True)
        self._process.start()
        far_end.close()
        try:
            self.link.target = self._pipe.recv()
        except EOFError:
            self.problems.append(f"{self.name} did not start: {log}")
        self.started_s = time.monotonic() - began_s

    def end(self, number: signal.Signals) -> None:
        """Kill it, or have it drain, and wait until it has ended. Not ending, or with a wrong code, is a problem."""
        if not self._process.is_alive():
            self.problems.append(f"{self.name} had ended by itself: {self._process.exitcode}")
            return
        self._signal(number)
        self._process.join(TERM_S)
        if self._process.is_alive():
            self.problems.append(f"{self.name} did not end within {TERM_S:.0f} s of {number.name}")
            self._process.kill()
            self._process.join()
        elif number is signal.SIGTERM and self._process.exitcode:
            self.problems.append(f"{self.name} ended with {self._process.exitcode} after SIGTERM")
        self.link.target = ""

    def pause(self, seconds: float) -> None:
        self._signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._signal(signal.SIGCONT)

    def resident_mib(self) -> float:
        """Memory that is its own: pages of files, such as libraries, come and go with the machine's cache."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd"))

    def tasks(self) -> int:
        self._pipe.send("tasks")
        return self._pipe.recv()

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid


class Deployment:
    """One planner and as many of the others as asked for.

    Attributes:
        secret: the token of the internal ports.
    """

    def __init__(self, folder: Path, drafters: int, verifiers: int, doors: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # no threads that a fork would lose; the model is tiny
        prepare(folder)
        self.secret = (folder / "secret").read_text().strip()
        proxy = Proxy()
        links = {kind: [proxy.link() for _ in range(count)] for kind, count in (("planner", 1), ("drafter", drafters))}
        links |= {"verifier": [proxy.link() for _ in range(verifiers)], "door": [proxy.link() for _ in range(doors)]}
        found = {"verifier": links["planner"] + links["drafter"], "door": links["verifier"]}
        self.services = [
            Service(kind, number, link, folder, found.get(kind, []))
            for kind, group in links.items()
            for number, link in enumerate(group)
        ]

    def of(self, kind: str) -> list[Service]:
        return [service for service in self.services if service.kind == kind]

    def client(self) -> TreelineClient:
        """Our client, which knows all front doors."""
        return TreelineClient([door.link.endpoint for door in self.of("door")], resume_wait_s=120)

    def until_ready(self, timeout_s: float = 120) -> None:
        """Wait until the front doors have all verifiers, and these a drafter."""
        deadline_s = time.monotonic() + timeout_s
        for door in self.of("door"):
            with TreelineClient(door.link.endpoint) as client:
                while True:
                    try:
                        load = client.load()
                        if load.drafter_ready and load.max_requests_running == 8 * len(self.of("verifier")):
                            break
                    except Exception:  # whatever it is, it is waited for
                        load = None
                    assert time.monotonic() < deadline_s, f"{door.name} is not ready: {load}"
                    time.sleep(0.2)


@contextmanager
def running(folder: Path, drafters: int, verifiers: int, doors: int) -> Iterator[Deployment]:
    deployment = Deployment(folder, drafters, verifiers, doors)
    try:
        for kind in ("planner", "drafter", "verifier", "door"):
            with ThreadPoolExecutor() as pool:
                list(pool.map(Service.start, deployment.of(kind)))
        deployment.until_ready()
        yield deployment
    finally:
        for service in deployment.services:
            service.end(signal.SIGKILL)
