"""One service in a process of its own, forked from a server that has the libraries loaded: it starts in a second.

A process does not share anything else with others, and ends with whoever holds the other end of its pipe.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from drafter_svc import server as drafter_server
from front_door.server import FrontDoorServer
from planner.service.server import PlannerServer
from tests.verifier_svc.services import discovery, save_tiny_model
from treeline.config import Config
from treeline.rpc.channels import freeze_started
from verifier_svc.service.server import VerifierServer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])

GRACE_S = 0.2
"""Shorter than the answers, so that draining has streams to hand over."""
RESUME_WAIT_S = 120.0
"""Longer than all verifiers take to start again on a busy machine."""
MAX_CONTEXT, CACHE_TOKENS = 512, 2048
"""Eight requests of full length need twice the cache, so that some are preempted."""


def prepare(folder: Path) -> None:
    """The model and the internal secret of a deployment."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_model(folder / "target", hidden_size=64, num_attention_heads=8)  # int8 comes in groups of 32
    (folder / "secret").write_text("of-the-services\n")


def config_of(folder: Path) -> Config:
    """The target drafts for itself, by our kernels: oneDNN's would fill a cache of 100 MiB (`test_memory.py`), whose
    growth would hide a leak for half an hour."""
    model = {"model": str(folder / "target"), "dtype": "float32", "quantization": "int8", "threads": 1}
    return Config.model_validate(
        {
            "server": {"port": 0, "http": {"port": 0}, "resume_wait_s": RESUME_WAIT_S},
            "verifier": {"target": model, "kv_cache_tokens": CACHE_TOKENS, "prefill_chunk_tokens": 32},
            "drafter": {"kind": "model", "model": model},
            "limits": {"max_running_requests": 8, "max_waiting_requests": 24, "max_context_tokens": MAX_CONTEXT},
            "metrics": {"base_port": 0},
            "internal": {"token_file": folder / "secret"},
        }
    )


def _no_socket(*args: object) -> None:
    raise OSError("switched off in this process")


async def _start(kind: str, config: Config, found: list[str]) -> Any:
    if kind == "planner":
        return await PlannerServer.start(config)
    if kind == "drafter":
        if os.getpid() % 2:  # Half of them are reached by their port, behind the proxy.
            drafter_server.LocalServer = _no_socket  # type: ignore[assignment, misc]
        return await drafter_server.DrafterServer.start(config)
    if kind == "verifier":
        return await VerifierServer.start(config, discovery(found[1:]), discovery(found[:1]))
    return await FrontDoorServer.start(config, discovery(found))


async def _serve(kind: str, folder: Path, found: list[str], pipe: Connection) -> None:
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def answer() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        pipe.send(len(asyncio.all_tasks()))

    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_reader(pipe.fileno(), answer)
    server = await _start(kind, config_of(folder), found)
    freeze_started()
    pipe.send(server.endpoint)
    await stopping.wait()
    await server.stop(GRACE_S)


def run(kind: str, folder: Path, found: list[str], pipe: Connection, log: Path) -> None:
    """Serve until SIGTERM. Sends "host:port" once it listens, then for each message the number of asyncio tasks.

    Args:
        kind: planner, drafter, verifier or door.
        folder: that of `prepare`.
        found: the addresses that it discovers. A verifier's are the planner, then drafters; a front door's, verifiers.
        log: takes standard error.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    asyncio.run(_serve(kind, folder, found, pipe))
