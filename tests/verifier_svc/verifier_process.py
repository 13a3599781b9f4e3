"""`python -m tests.verifier_svc.verifier_process MODEL [PLANNER DRAFTER ...]`: a real verifier in a process of its own.

It runs until SIGTERM, with the planner and the drafters at these addresses, if any.

Prints "host:port" once it listens.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.verifier_svc.services import discovery, drafting_config, tiny_config
from verifier_svc.service.server import VerifierServer

GRACE_S = 0.2
"""Shorter than the answers of the tests, so that draining has streams to hand over."""


async def main(target: Path, planner: list[str], drafters: list[str]) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    config = drafting_config(target) if drafters else tiny_config(target)
    server = await VerifierServer.start(config, discovery(drafters), discovery(planner))
    print(server.endpoint, flush=True)
    await stopping.wait()
    await server.stop(GRACE_S)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:3], sys.argv[3:]))
