"""A Prometheus beside `treeline serve`: the one on PATH, with the shipped configuration, for as long as it serves."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from treeline.config import Config
from treeline.rpc.tokens import read_tokens

SHIPPED = Path(__file__).parent / "prometheus"
STOP_S = 3.0
TIED = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):  # else it ended before the call
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""A program with arguments PARENT COMMAND...: it becomes the command, which ends when the process PARENT ends, for any
reason. Strictly, it ends with the thread that started it: `serve` uses its main one."""
RETENTION = "1d"
"""The planner reads the last seconds, a person the last hours; neither needs older data."""


class LocalPrometheus:
    """`url`: of its query API, which listens once it is started."""

    def __init__(self, program: str) -> None:
        self._program = program
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{self._address}"
        self._command: list[str | Path] = []
        self._log = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, config: Config, front_door: str, folder: Path, logs: Path) -> None:
        """Scrape what the HTTP port of `front_door` ("host:port") lists; keep configuration and data in `folder`."""
        folder.mkdir(mode=0o700, exist_ok=True)  # the configuration may hold a token
        shutil.copy(SHIPPED / "rules.yml", folder)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(scrape_config(config, front_door)))
        self._command = [
            self._program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--storage.tsdb.retention.time={RETENTION}",
            f"--web.listen-address={self._address}",
        ]
        self._log = logs / "prometheus.log"
        self._log.unlink(missing_ok=True)
        self.restart()

    def restart(self) -> None:
        """Start it again after `stop`, with the data that it kept."""
        with self._log.open("a") as log:
            # Only Linux can tie a process to its parent. Not in a preexec_fn, which is not safe beside threads.
            tied = [sys.executable, "-IS", "-c", TIED, str(os.getpid())] if sys.platform == "linux" else []
            # In its own process group: Ctrl-C is for the service, which still measures while it drains.
            self._process = subprocess.Popen([*tied, *self._command], stdout=log, stderr=log, process_group=0)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
            self._process.kill()


def find(config: Config, joined: bool) -> tuple[LocalPrometheus | None, str]:
    """The Prometheus that `metrics.prometheus: auto` asks for, or why there is none, in a line.

    `joined`: the cluster is not this process's own, and its planner may run on another node.
    """
    if config.metrics.prometheus == "none" or config.planner.prometheus_url is not None:
        return None, ""
    program = shutil.which("prometheus")
    if joined:
        problem = "it would be out of the cluster's reach: set planner.prometheus_url"
    elif not config.server.http.enabled:
        problem = "its targets are listed at the HTTP port, which is off"
    elif program is None:
        problem = "none on PATH"
    else:
        return LocalPrometheus(program), ""
    return None, f"no Prometheus ({problem}); latency is measured by step records"


def scrape_config(config: Config, front_door: str) -> dict[str, Any]:
    """The shipped configuration, with its targets from `front_door`."""
    shipped = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    (job,) = shipped["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    server, pages = config.server, config.metrics
    discovery["url"] = f"{'https' if server.tls else 'http'}://{front_door}/targets"
    if server.token_file is not None:
        discovery["authorization"] = {"credentials": read_tokens(server.token_file)[0]}
    if server.tls is not None:  # by address, on this machine: the certificate is for another name
        discovery["tls_config"] = {"insecure_skip_verify": True}
    if pages.token_file is not None:
        job["authorization"] = {"credentials": read_tokens(pages.token_file)[0]}
    return shipped
