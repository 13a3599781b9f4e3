"""Watches the running application, and ends it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
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

from deploy.app import APP
from deploy.local_prometheus import LocalPrometheus
from deploy.ray_processes import RayProcesses
from deploy.replicas import DISCOVERY_TIMEOUT_S, SHUTDOWN_GRACE_S

JOIN_INTERVAL_S = 0.2
CHECK_INTERVAL_S = 2.0
"""Pause between checks of Ray and the application: each costs the controller a call."""
SILENCE_S, FAILING_S = 20.0, 20.0
"""If Ray Serve does not answer, or a service has no replica and new ones fail to start, for so long, it won't recover.
The controller's own restart takes a few seconds."""
STOP_S, LOST_STOP_S = SHUTDOWN_GRACE_S + 15, 5.0
"""Limit of a stop: draining requests, then ending the replicas and Ray; and of one with nothing left to drain."""


class RunningApp:
    """The started application. `endpoint`: "host:port" of the clients' port; `prometheus`: its own, if it has one."""

    def __init__(self, endpoint: str, secret: Path | None = None, prometheus: LocalPrometheus | None = None) -> None:
        """`secret`: the file of this run's own secret, if it has one."""
        self.endpoint = endpoint
        self._secret, self.prometheus = secret, prometheus
        self._ray = RayProcesses()
        self._stopping = threading.Event()
        self._silent_checks, self._failing = 0, ""
        threading.Thread(target=self._keep_status, name="keep-status", daemon=True).start()

    def stop_on_signals(self) -> None:
        """Let SIGINT and SIGTERM end `wait`. A second one ends everything at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def wait(self) -> str:
        """Wait for a signal, or until the application can't recover by itself. Returns why, else nothing."""
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
        if self.prometheus is not None:
            self.prometheus.stop()
        if self._secret is not None:
            self._secret.unlink(missing_ok=True)

    def _keep_status(self) -> None:
        """Keep `wait` informed of the application. If Ray is gone, this thread hangs."""
        failing_since_s: float | None = None
        while not self._stopping.wait(CHECK_INTERVAL_S):
            self._ray.look()
            with contextlib.suppress(Exception):
                failure = _failure()
                self._silent_checks = 0
                failing_since_s = (failing_since_s or time.monotonic()) if failure else None
                if failing_since_s is not None and time.monotonic() - failing_since_s > FAILING_S:
                    self._failing = failure


def _end_application() -> None:
    with contextlib.suppress(Exception):  # Ray may be gone; what is left of it is killed
        serve.delete(APP)
        ray.shutdown()


def statuses() -> tuple[ApplicationStatusInfo, list[DeploymentStatusInfo]]:
    """Status of the app and its deployments. `serve.status()` spends 0.1 s of CPU on their whole configuration."""
    overview = cast(ServeControllerClient, _get_global_client()).get_serve_status(APP)
    return overview.app_status, overview.deployment_statuses


def _failure() -> str:
    """Why a service has no replica and its new ones fail to start; empty if there is no such service."""
    _, deployments = statuses()
    for failing in (one for one in deployments if "failed to start" in one.message):
        if not serve.status().applications[APP].deployments[failing.name].replica_states.get(ReplicaState.RUNNING):
            return f"{failing.name} does not come back: {cause(failing.message)}"
    return ""


def cause(message: str) -> str:
    """The line of a replica's stack trace that says what is wrong."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines() if line.strip()]
    named = [line for line in lines if "ConfigError:" in line]
    if named:
        return named[-1].partition("ConfigError:")[2].strip()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["unknown"])[-1]
