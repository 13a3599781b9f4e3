"""Runs the application from this process: on the Ray cluster of $RAY_ADDRESS, else on a Ray of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import serve
from ray.exceptions import RayError

from deploy.app import APP, DISCOVERY_TIMEOUT_S, application
from treeline.config import Config
from treeline.errors import ConfigError

SERVICES = ("planner", "drafter", "verifier", "front-door")
TARGETS_INTERVAL_S = 5.0
SERVING_TIMEOUT_S = 60.0
"""From the start of all replicas until the front door has found a verifier."""
OBJECT_STORE_BYTES = 100 << 20


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


def run(config: Config, *, block: bool) -> RunningApp:
    """Start the application and wait until it serves; with `block`, until it is told to stop.

    Raises:
        ConfigError: a service cannot start as configured.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _start_ray(config)
    try:
        serve.start(proxy_location="Disabled")
        serve.run(application(config), name=APP, route_prefix=None)
        front_door = serve.get_deployment_handle("front-door", APP)
        endpoint = front_door.serving_endpoint.remote().result(timeout_s=SERVING_TIMEOUT_S)
    except TimeoutError:
        ray.shutdown()
        raise ConfigError(f"no verifier could be reached within {SERVING_TIMEOUT_S:.0f} s of its start") from None
    except RuntimeError as error:
        ray.shutdown()
        raise ConfigError(f"the application did not start: {_cause(str(error))}") from None
    except BaseException:
        ray.shutdown()
        raise
    app = RunningApp(config, endpoint)
    if block:
        print(f"serving at {app.endpoint}; Ctrl-C stops", file=sys.stderr, flush=True)
        app.wait()
        print("stopping ...", file=sys.stderr, flush=True)
        app.stop()
    return app


def write_targets(path: Path, targets: dict[str, list[str]]) -> None:
    """Write Prometheus' file_sd JSON, whole or not at all."""
    entries = [{"targets": pages, "labels": {"service": service}} for service, pages in targets.items() if pages]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=2)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _start_ray(config: Config) -> None:
    """Join the cluster of $RAY_ADDRESS, or start one on this machine with enough (logical) CPUs for all replicas."""
    init = partial(ray.init, log_to_driver=False, logging_level=logging.ERROR, namespace=APP)
    if os.environ.get("RAY_ADDRESS"):
        init()
        return
    parts = (config.planner, config.drafter, config.verifier, config.server)
    wanted = sum(part.resources.num_cpus * part.resources.replicas for part in parts)
    init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(wanted) + 1),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
    )


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
