"""Runs the application from this process: on the Ray cluster of $RAY_ADDRESS, else on a Ray of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A thread that calls Ray while Ray stops would start another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# Ray's node connects to its object store before the store listens, and by default waits a second to retry.
os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "20")
os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "500")
# Ray gives its workers the priority of batch jobs (nice 15): beside a busy process, a token took seconds.
os.environ.setdefault("RAY_worker_niceness", "0")
# A new replica's first answer may take longer than 0.1 s, and Serve's router would warn.
os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1")

import ray
from ray import serve
from ray.serve._private.common import DeploymentStatusInfo
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from deploy.app import APP, application
from deploy.local_prometheus import find
from deploy.ray_processes import RayProcesses, lean_ray
from deploy.running import LOST_STOP_S, STOP_S, RunningApp, cause, statuses
from treeline.config import Config
from treeline.errors import ConfigError
from treeline.rpc.channels import reachable_host

SERVING_TIMEOUT_S = 60.0
"""From the start of all replicas until the front door has found a verifier."""
OBJECT_STORE_BYTES = 100 << 20
STATUS_INTERVAL_S = 0.2
PACKAGES = Path(__file__).resolve().parent.parent
"""The folder that holds our packages."""


def run(config: Config, *, block: bool, report: Callable[[str], None] = lambda phase: None) -> RunningApp:
    """Start the application and wait until it serves; with `block`, until it is told to stop or is lost.

    With `block` this process then ends: exit code 0 if it was told to, 1 if the application was lost.

    Args:
        report: is called with each phase of the start, in a few words.

    Raises:
        ConfigError: it did not start. The message is one line: the cause, and where the logs are.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    config = config.with_absolute_paths()
    logs = f"{os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"  # until Ray says where
    try:
        report("starting Ray")
        logs = _start_ray(config)
        report(f"logs: {logs}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)  # Ray's own handler prints a stack trace and aborts
        prometheus, missing = find(config, joined=bool(os.environ.get("RAY_ADDRESS")))
        if missing:
            report(missing)
        if prometheus is not None:
            planner = config.planner.model_copy(update={"prometheus_url": prometheus.url})
            config = config.model_copy(update={"planner": planner})
        secured = with_secret(config, Path(logs).parent)
        report("starting the services")
        serve.start(proxy_location="Disabled")
        serve.run_many([serve.RunTarget(application(secured), APP, None)], wait_for_applications_running=False)
        _until_running(report)
        report("waiting for the front door to find a verifier")
        front_door = serve.get_deployment_handle("front-door", APP)
        endpoint = front_door.serving_endpoint.remote().result(timeout_s=SERVING_TIMEOUT_S)
        if prometheus is not None:
            host = reachable_host(config.server.host)
            port = front_door.http_port.remote().result(timeout_s=SERVING_TIMEOUT_S)
            prometheus.start(config, f"{host}:{port}", Path(logs).parent / "prometheus", Path(logs))
            report(f"prometheus listens at {prometheus.url}")
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
        raise ConfigError(f"the application did not start: {cause(str(error))}; logs: {logs}") from None
    except BaseException:
        _shut_down()
        raise
    secret = None if secured is config else secured.internal.token_file
    app = RunningApp(endpoint, secret, prometheus)
    if block:
        app.stop_on_signals()  # before anybody is told that it serves, and may stop it
        page = f" and {config.server.page}" if config.server.page else ""
        print(f"serving at {app.endpoint}{page}; Ctrl-C stops", file=sys.stderr, flush=True)
        problem = app.wait()
        print(f"treeline: {problem}; logs: {logs}" if problem else "stopping ...", file=sys.stderr, flush=True)
        app.stop(LOST_STOP_S if problem else STOP_S)
        os._exit(1 if problem else 0)  # Ray's own exit waits a minute for a Ray that is gone
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
            wanted = sum(part.resources.num_cpus * part.resources.most_replicas for part in parts)
            with lean_ray():
                context = init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
            gpus_wanted = sum(part.resources.num_gpus * part.resources.most_replicas for part in parts)
            gpus = ray.cluster_resources().get("GPU", 0)
            if gpus_wanted > gpus:
                raise ConfigError(f"the services ask for {gpus_wanted:g} GPUs (num_gpus), this machine has {gpus:g}")
    finally:
        os.chdir(launch_folder)
    return f"{cast(Any, context).address_info['session_dir']}/logs"


def _until_running(report: Callable[[str], None]) -> None:
    """Wait until every service runs, and report each change of its state.

    Raises:
        ConfigError: a replica failed to start. Ray would retry, but the cause is rarely transient.
    """
    phases: dict[str, str] = {}
    while True:
        app, deployments = statuses()
        for deployment in deployments:
            if "failed to start" in deployment.message:
                raise ConfigError(f"{deployment.name} did not start: {cause(deployment.message)}")
            phase = _phase(deployment)
            if phase and phases.get(deployment.name) != phase:
                phases[deployment.name] = phase
                report(f"{deployment.name} {phase}")
        if app.status == ApplicationStatus.RUNNING:
            return
        if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ConfigError(f"the application did not start: {cause(app.message)}")
        time.sleep(STATUS_INTERVAL_S)


def _phase(deployment: DeploymentStatusInfo) -> str:
    """What a deployment is doing, in words; empty if there is nothing to say."""
    if deployment.status == DeploymentStatus.HEALTHY:
        return "is running"
    if "to be scheduled" in deployment.message:
        return "is waiting for a process, or for CPUs or GPUs that are not free"
    if "to initialize" in deployment.message:
        return "is still loading"
    return ""


def _end(number: int, _: object) -> None:
    try:
        RayProcesses().kill()
    finally:
        os._exit(128 + number)  # an exception would pass through Ray, which turns it into another


def _shut_down() -> None:
    """End what a failed start has left, within a few seconds."""
    with contextlib.suppress(Exception):
        ray.shutdown()
