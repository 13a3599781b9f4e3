"""Limits idle streams separately, so that they cannot shut out real requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from treeline.rpc.interceptors import SERVICE, write_all

MAX_SILENT = 256
"""Open calls whose message has not arrived. One more evicts the oldest: an honest client's message arrives with its
call, within milliseconds."""
MESSAGE_TIMEOUT_S = 10.0
MAX_WATCHES = 64
"""Open streams of other services (health, reflection): a few per orchestrator. More are refused."""


class StreamLimits(grpc.aio.ServerInterceptor):
    """Reads the message of each call itself, to know which calls have none."""

    def __init__(self) -> None:
        self._silent: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
        self._watches = 0

    async def intercept_service(self, continuation: Callable, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        watches = handler.response_streaming and not handler_call_details.method.startswith(f"/{SERVICE}/")

        async def unary(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            return await handler.unary_unary(await self._message(requests, context), context)

        async def stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            given = requests if handler.request_streaming else await self._message(requests, context)
            if watches and self._watches >= MAX_WATCHES:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} such streams are open")
            self._watches += watches
            try:
                await write_all((handler.stream_stream or handler.unary_stream)(given, context), context)
            finally:
                self._watches -= watches

        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, parse, serialize)
        return grpc.stream_unary_rpc_method_handler(unary, parse, serialize)

    async def _message(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        reading = asyncio.ensure_future(_first(requests))
        reading.add_done_callback(lambda read: read.cancelled() or read.exception())  # nobody else may retrieve it
        self._silent[reading] = gives_way = asyncio.get_running_loop().create_future()
        if len(self._silent) > MAX_SILENT:
            self._silent.pop(next(iter(self._silent))).set_result(None)
        try:
            await asyncio.wait((reading, gives_way), timeout=MESSAGE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._silent.pop(reading, None)
        if reading.done():
            return reading.result()
        if gives_way.done():
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls without a message are open")
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {MESSAGE_TIMEOUT_S:.0f} s")


async def _first(requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        return request
    raise ConnectionError("the call ended without a message")
