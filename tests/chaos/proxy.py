"""A small TCP proxy between services, in a thread of its own: it delays, holds and cuts what passes."""

from __future__ import annotations

import asyncio
import threading

CHUNK_BYTES = 1 << 16


class Link:
    """A fixed address in front of a service whose own address changes with each start. Use it from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._flows = loop, asyncio.Event()
        self._flows.set()
        self._transports: set[asyncio.Transport] = set()
        self.target = ""  # the service's "host:port"; empty while it does not run
        self.delay_s = 0.0  # of each piece of data, either way
        self.endpoint = ""

    async def listen(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def hold(self, held: bool) -> None:
        """Let nothing pass, as a network without a route does, until it is called again."""
        self._loop.call_soon_threadsafe(self._flows.clear if held else self._flows.set)

    def cut(self) -> None:
        """Reset all connections; new ones may be made."""
        self._loop.call_soon_threadsafe(lambda: [transport.abort() for transport in self._transports])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._transports.add(writer.transport)
        try:
            host, _, port = self.target.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port or 0))
            writers.append(back)
            self._transports.add(back.transport)
            pumps = [asyncio.ensure_future(self._pump(*ends)) for ends in ((reader, back), (there, writer))]
            _, open_ends = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in open_ends:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # it does not run: the caller sees a reset
        finally:
            for each in writers:
                each.transport.abort()
                self._transports.discard(each.transport)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._flows.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            await writer.drain()


class Proxy:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def link(self) -> Link:
        link = Link(self._loop)
        asyncio.run_coroutine_threadsafe(link.listen(), self._loop).result(10)
        return link
