"""Clients of the generation service: `TreelineClient` blocks, `AsyncClient` is for asyncio."""

from treeline.client.aio import AsyncClient
from treeline.client.blocking import TreelineClient

Client = TreelineClient

__all__ = ["AsyncClient", "Client", "TreelineClient"]
