"""The clients' HTTP port: uvicorn in the front door's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry

from front_door.access import AccessLog
from front_door.http.app import create_app
from front_door.service import FrontDoor
from treeline.config import ServerConfig
from treeline.errors import ConfigError
from treeline.rpc.channels import DiscoverPages, family_of
from treeline.rpc.tokens import TokenFile

START_TIMEOUT_S = 10.0


class HttpServer:
    """The listening HTTP server. `port`: its port."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server, self._serving = server, serving
        self.port: int = server.servers[0].sockets[0].getsockname()[1]

    @classmethod
    async def start(
        cls,
        config: ServerConfig,
        max_body_bytes: int,
        door: FrontDoor,
        tokens: TokenFile | None,
        registry: CollectorRegistry,
        pages: DiscoverPages,
        access: AccessLog,
    ) -> HttpServer:
        """Raises ConfigError if the port is taken, or a certificate cannot be read."""
        app = create_app(door, registry, tokens, max_body_bytes, pages, access)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ssl_certfile=config.tls.certificate if config.tls else None,
            ssl_keyfile=config.tls.private_key if config.tls else None,
        )
        server = _Server(settings)
        # Opened here: if uvicorn can't listen it exits, which would leave a replica without its event loop.
        try:
            listening = socket.create_server((config.host, config.http.port), family=family_of(config.host))
            serving = asyncio.create_task(server.serve([listening]), name="http")
            async with asyncio.timeout(START_TIMEOUT_S):
                while not server.started:
                    if serving.done():
                        serving.result()
                    await asyncio.sleep(0.01)
        except OSError as error:
            where, problem = f"{config.host}:{config.http.port}", error.strerror or type(error).__name__
            raise ConfigError(f"cannot listen on {where}: {problem}; see server.http.port") from None
        return cls(server, serving)

    async def stop(self, grace_s: float) -> None:
        """Refuse new connections, let open answers end within `grace_s`."""
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._serving), grace_s)
        self._server.force_exit = True
        await asyncio.gather(self._serving, return_exceptions=True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Signals belong to the process, not to this port."""
        yield
