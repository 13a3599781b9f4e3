"""Runs the application from this process: on the Ray cluster of $RAY_ADDRESS, else on a Ray of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus, DeploymentStatus, DeploymentStatusOverview

from deploy.app import APP, DISCOVERY_TIMEOUT_S, application
from treeline.config import Config
from treeline.errors import ConfigError

SERVICES = ("planner", "drafter", "verifier", "front-door")
TARGETS_INTERVAL_S = 5.0
SERVING_TIMEOUT_S = 60.0
"""From the start of all replicas until the front door has found a verifier."""
OBJECT_STORE_BYTES = 100 << 20
STATUS_INTERVAL_S = 0.2
PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that holds our packages."""
RAY_LOGS = "/tmp/ray/session_latest/logs"
"""Where Ray logs unless it is told otherwise."""


class RunningApp:
    """The application, started. `endpoint`: "host:port" of the clients' port."""

    def __init__(self, config: Config, endpoint: str) -> None:
        self.endpoint = endpoint
        self._targets_file = config.metrics.targets_file
        self._stopping = threading.Event()
        self._targets = threading.Thread(target=self._keep_targets, name="targets", daemon=True)
        self._targets.start()

    def wait(self) -> None:
        """Until SIGINT or SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stopping.set())
        while not self._stopping.wait(1.0):
            pass

    def kill_verifier(self) -> None:
        """Kill a verifier's process, which has to run on this machine, without a warning: for demonstrations."""
        answer = serve.get_deployment_handle("verifier", APP).broadcast("process_id")
        os.kill(answer.results(timeout_s=DISCOVERY_TIMEOUT_S)[0], signal.SIGKILL)

    def stop(self) -> None:
        """Let running requests end for a few seconds, then end everything that `run` started."""
        self._stopping.set()
        self._targets.join()
        with contextlib.suppress(OSError):
            self._targets_file.unlink()
        with contextlib.suppress(RayError, RuntimeError):
            serve.delete(APP)
        ray.shutdown()

    def _keep_targets(self) -> None:
        """Keep Prometheus told of the replicas' pages, which move when replicas are replaced."""
        while True:
            with contextlib.suppress(Exception):  # a service may be down right now; the next round will tell
                write_targets(self._targets_file, _metrics_targets())
            if self._stopping.wait(TARGETS_INTERVAL_S):
                return


def run(config: Config, *, block: bool, report: Callable[[str], None] = lambda phase: None) -> RunningApp:
    """Start the application and wait until it serves; with `block`, until it is told to stop.

    Args:
        report: is called with each phase of the start, in a few words.

    Raises:
        ConfigError: it did not start. The message is one line: the cause, and where the logs are.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    config = config.with_absolute_paths()
    logs = RAY_LOGS
    try:
        report("starting Ray")
        logs = _start_ray(config)
        config = with_secret(config, Path(logs).parent)
        report("starting the services")
        serve.start(proxy_location="Disabled")
        serve.run_many([serve.RunTarget(application(config), APP, None)], wait_for_applications_running=False)
        _until_running(report)
        report("waiting for the front door to find a verifier")
        front_door = serve.get_deployment_handle("front-door", APP)
        endpoint = front_door.serving_endpoint.remote().result(timeout_s=SERVING_TIMEOUT_S)
    except TimeoutError:
        _shut_down()
        raise ConfigError(
            f"the front door reached no verifier within {SERVING_TIMEOUT_S:.0f} s of its start; logs: {logs}"
        ) from None
    except ConfigError as error:
        _shut_down()
        raise ConfigError(f"{error}; logs: {logs}") from None
    except Exception as error:
        _shut_down()
        raise ConfigError(f"the application did not start: {_cause(str(error))}; logs: {logs}") from None
    except BaseException:
        _shut_down()
        raise
    app = RunningApp(config, endpoint)
    if block:
        print(f"serving at {app.endpoint}; Ctrl-C stops", file=sys.stderr, flush=True)
        app.wait()
        print("stopping ...", file=sys.stderr, flush=True)
        app.stop()
    return app


def with_secret(config: Config, folder: Path) -> Config:
    """`config` with a secret between the services: the configured one, else a new one in `folder`, which lives as long
    as this Ray. A cluster needs a configured one, as its nodes share no folder.
    """
    if config.internal.token_file is not None or os.environ.get("RAY_ADDRESS"):
        return config
    path = folder / "internal-token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_urlsafe(32))
    internal = config.internal.model_copy(update={"token_file": path})
    return config.model_copy(update={"internal": internal})


def write_targets(path: Path, targets: dict[str, list[str]]) -> None:
    """Write Prometheus' file_sd JSON, whole or not at all."""
    entries = [{"targets": pages, "labels": {"service": service}} for service, pages in targets.items() if pages]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=2)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _start_ray(config: Config) -> str:
    """Join the cluster of $RAY_ADDRESS, or start one on this machine with enough (logical) CPUs for all replicas.

    Returns the folder of Ray's logs.

    Raises:
        ConfigError: this machine lacks a GPU that the configuration asks for.
    """
    # Ray puts this process's folder in front of its workers' module path, where a folder of the user's named
    # `treeline` or `deploy` would hide ours.
    launch_folder = Path.cwd()
    os.chdir(PACKAGES)
    init = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, namespace=APP)
    parts = (config.planner, config.drafter, config.verifier, config.server)
    try:
        if os.environ.get("RAY_ADDRESS"):
            context = init()
        else:
            wanted = sum(part.resources.num_cpus * part.resources.replicas for part in parts)
            context = init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            gpus_wanted = sum(part.resources.num_gpus * part.resources.replicas for part in parts)
            gpus = ray.cluster_resources().get("GPU", 0)
            if gpus_wanted > gpus:
                raise ConfigError(f"the services ask for {gpus_wanted:g} GPUs (num_gpus), this machine has {gpus:g}")
    finally:
        os.chdir(launch_folder)
    return f"{cast(Any, context).address_info['session_dir']}/logs"


def _until_running(report: Callable[[str], None]) -> None:
    """Wait until every service runs, and report each change of its state.

    Raises:
        ConfigError: a replica failed to start. Ray would try again, but the cause is rarely one that passes.
    """
    phases: dict[str, str] = {}
    while True:
        app = serve.status().applications[APP]
        for name, deployment in app.deployments.items():
            if "failed to start" in deployment.message:
                raise ConfigError(f"{name} did not start: {_cause(deployment.message)}")
            phase = _phase(deployment)
            if phase and phases.get(name) != phase:
                phases[name] = phase
                report(f"{name} {phase}")
        if app.status == ApplicationStatus.RUNNING:
            return
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ConfigError(f"the application did not start: {_cause(app.message)}")
        time.sleep(STATUS_INTERVAL_S)


def _phase(deployment: DeploymentStatusOverview) -> str:
    """What a deployment is doing, in words; empty if there is nothing to say."""
    if deployment.status == DeploymentStatus.HEALTHY:
        return "is running"
    if "to be scheduled" in deployment.message:
        return "is waiting for a process, or for CPUs or GPUs that are not free"
    if "to initialize" in deployment.message:
        return "is still loading"
    return ""


def _shut_down() -> None:
    """End what a failed start has left, within a few seconds."""
    with contextlib.suppress(Exception):
        ray.shutdown()


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


def _cause(message: str) -> str:
    """The line of a replica's stack trace that says what is wrong."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines() if line.strip()]
    named = [line for line in lines if "ConfigError:" in line]
    if named:
        return named[-1].partition("ConfigError:")[2].strip()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["unknown"])[-1]
