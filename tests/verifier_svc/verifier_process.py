"""`python -m tests.verifier_svc.verifier_process MODEL`: a real verifier in a process of its own, until SIGTERM.

Prints "host:port" once it listens.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.verifier_svc.services import discovery, tiny_config
from verifier_svc.service.server import VerifierServer

GRACE_S = 0.2
"""Shorter than the answers of the tests, so that draining has streams to hand over."""


async def main(target: Path) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    server = await VerifierServer.start(tiny_config(target), discovery([]), discovery([]))
    print(server.endpoint, flush=True)
    await stopping.wait()
    await server.stop(GRACE_S)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
