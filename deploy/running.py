"""The application while it runs: watched, told of to Prometheus, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import cast

import ray
from ray import serve
from ray.serve._private.application_state import ApplicationStatusInfo
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import DeploymentStatusInfo
from ray.serve.context import _get_global_client
from ray.serve.schema import ReplicaState

from deploy.app import APP, DISCOVERY_TIMEOUT_S, SHUTDOWN_GRACE_S
from deploy.ray_processes import RayProcesses

SERVICES = ("planner", "drafter", "verifier", "front-door")
TARGETS_INTERVAL_S = 5.0
JOIN_INTERVAL_S = 0.2
CHECK_INTERVAL_S = 2.0
"""Between looks at Ray and the application while they serve: each costs the controller a call."""
SILENCE_S, FAILING_S = 20.0, 20.0
"""Ray Serve not answering, or a service without a replica whose new ones fail to start, for so long: it won't recover.
The controller's own restart takes a few seconds."""
STOP_S, LOST_STOP_S = SHUTDOWN_GRACE_S + 15, 5.0
"""What a stop may take: the grace of running requests, the replicas' own end, and Ray's; and where there is nothing
left to drain."""


class RunningApp:
    """The application, started. `endpoint`: "host:port" of the clients' port."""

    def __init__(self, endpoint: str, targets_file: Path, secret: Path | None = None) -> None:
        """`secret`: the file of this run's own secret, if it has one."""
        self.endpoint = endpoint
        self._targets_file, self._secret = targets_file, secret
        self._ray = RayProcesses()
        self._stopping = threading.Event()
        self._silent_checks, self._failing = 0, ""
        for watch in (self._keep_targets, self._keep_status):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()

    def stop_on_signals(self) -> None:
        """Let SIGINT and SIGTERM end `wait`. A second one ends everything at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def wait(self) -> str:
        """Until a signal, or until the application can't come back by itself: returns why, else nothing."""
        while not self._stopping.wait(CHECK_INTERVAL_S):
            self._silent_checks += 1
            if ended := self._ray.ended():
                return f"Ray's {ended} has ended"
            if self._silent_checks * CHECK_INTERVAL_S > SILENCE_S:
                return f"Ray Serve has not answered for {SILENCE_S:.0f} s"
            if self._failing:
                return self._failing
        return ""

    def kill_verifier(self) -> None:
        """Kill a verifier's process, which has to run on this machine, without a warning: for demonstrations."""
        answer = serve.get_deployment_handle("verifier", APP).broadcast("process_id")
        os.kill(answer.results(timeout_s=DISCOVERY_TIMEOUT_S)[0], signal.SIGKILL)

    def stop(self, within_s: float = STOP_S) -> None:
        """Let running requests end for a few seconds, then end everything that `run` started."""
        self._stopping.set()
        ending = threading.Thread(target=_end_application, name="end", daemon=True)
        ending.start()
        deadline_s = time.monotonic() + within_s
        while ending.is_alive() and time.monotonic() < deadline_s and not self._ray.ended():
            ending.join(JOIN_INTERVAL_S)
        self._remove()

    def _on_signal(self, number: int, _: object) -> None:
        if self._stopping.is_set():
            self._remove()
            os._exit(128 + number)
        self._stopping.set()

    def _remove(self) -> None:
        """Leave no process or file of ours."""
        self._ray.kill()
        for file in (self._targets_file, self._secret):
            if file is not None:
                file.unlink(missing_ok=True)

    def _keep_targets(self) -> None:
        """Keep Prometheus told of the replicas' pages, which move when replicas are replaced."""
        while True:
            with contextlib.suppress(Exception):  # a service may be down right now; the next round will tell
                targets = _metrics_targets()
                if not self._stopping.is_set():
                    write_targets(self._targets_file, targets)
            if self._stopping.wait(TARGETS_INTERVAL_S):
                return

    def _keep_status(self) -> None:
        """Keep `wait` told of the application; a Ray that is gone leaves this thread waiting."""
        failing_since_s: float | None = None
        while not self._stopping.wait(CHECK_INTERVAL_S):
            self._ray.look()
            with contextlib.suppress(Exception):
                failure = _failure()
                self._silent_checks = 0
                failing_since_s = (failing_since_s or time.monotonic()) if failure else None
                if failing_since_s is not None and time.monotonic() - failing_since_s > FAILING_S:
                    self._failing = failure


def write_targets(path: Path, targets: dict[str, list[str]]) -> None:
    """Write Prometheus' file_sd JSON, whole or not at all."""
    entries = [{"targets": pages, "labels": {"service": service}} for service, pages in targets.items() if pages]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=2)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _end_application() -> None:
    with contextlib.suppress(Exception):  # Ray may be gone; what is left of it is killed
        serve.delete(APP)
        ray.shutdown()


def statuses() -> tuple[ApplicationStatusInfo, list[DeploymentStatusInfo]]:
    """Of the application and its deployments. `serve.status()` spends 0.1 s of CPU on their whole configuration."""
    overview = cast(ServeControllerClient, _get_global_client()).get_serve_status(APP)
    return overview.app_status, overview.deployment_statuses


def _failure() -> str:
    """Why a service has no replica and its new ones fail to start; empty if there is no such service."""
    _, deployments = statuses()
    for failing in (one for one in deployments if "failed to start" in one.message):
        if not serve.status().applications[APP].deployments[failing.name].replica_states.get(ReplicaState.RUNNING):
            return f"{failing.name} does not come back: {cause(failing.message)}"
    return ""


def _metrics_targets() -> dict[str, list[str]]:
    handles = {service: serve.get_deployment_handle(service, APP) for service in SERVICES}
    answers = {service: handle.broadcast("metrics_target") for service, handle in handles.items()}
    return {
        service: [
            page
            for page in answer.results(timeout_s=DISCOVERY_TIMEOUT_S, return_exceptions=True)
            if isinstance(page, str)
        ]
        for service, answer in answers.items()
    }


def cause(message: str) -> str:
    """The line of a replica's stack trace that says what is wrong."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines() if line.strip()]
    named = [line for line in lines if "ConfigError:" in line]
    if named:
        return named[-1].partition("ConfigError:")[2].strip()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["unknown"])[-1]
