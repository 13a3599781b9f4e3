"""`python -m tests.verifier_svc.drafter_process MODEL`: a real drafter in a process of its own, until it is killed.

Prints "host:port" once it listens.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from drafter_svc.server import DrafterServer
from tests.verifier_svc.services import drafting_config


async def main(model: Path) -> None:
    server = await DrafterServer.start(drafting_config(model))
    print(server.endpoint, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
