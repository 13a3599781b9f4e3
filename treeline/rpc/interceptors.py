"""The interceptor of generation calls: malformed messages, errors as statuses, counting."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from treeline.errors import FieldViolation, InvalidRequestError, RequestBrokenError, TreelineError
from treeline.rpc.status import abort_as, abort_with, code_of
from treeline.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

DEADLINE_SLACK_S = 0.02
"""A call cancelled this close to its deadline counts as having exceeded it: timers fire a little early."""
_GENERATION = pb.DESCRIPTOR.services_by_name["GenerationService"]
SERVICE = _GENERATION.full_name
METHODS = frozenset(f"/{SERVICE}/{method}" for method in _GENERATION.methods_by_name)
HANDLERS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
MALFORMED = "not a valid message, or text in it is not UTF-8"
_PREFIX = f"/{SERVICE}/"


class MessageGuard(grpc.aio.ServerInterceptor):
    """Ends a call whose message protobuf cannot parse with INVALID_ARGUMENT, where grpc has UNKNOWN.

    Calls of the generation service pass: CallInterceptor counts them and adds the status details.
    """

    async def intercept_service(self, continuation: Callable, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        is_generation = handler_call_details.method.startswith(_PREFIX)
        if handler is None or handler.request_deserializer is None or is_generation:
            return handler

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if isinstance(request, DecodeError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
            return request

        async def all_checked(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for request in requests:
                yield await checked(request, context)

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if handler.request_streaming:
                given = all_checked(request, context)
            else:
                given = await checked(request, context)
            if handler.response_streaming:
                return await write_all((handler.stream_stream or handler.unary_stream)(given, context), context)
            return await (handler.stream_unary or handler.unary_unary)(given, context)

        (kind,) = (name for name in HANDLERS if getattr(handler, name) is not None)
        return handler._replace(request_deserializer=parsed_or_error(handler.request_deserializer), **{kind: answer})


def parsed_or_error(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse`, but returning a DecodeError: grpc turns one raised there into a status of its own."""

    def guarded_parse(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return error

    return guarded_parse


async def write_all(answer: Any, context: grpc.aio.ServicerContext) -> None:
    """`answer`: a handler's coroutine, which writes by itself, or its generator, written here and closed."""
    if not inspect.isasyncgen(answer):
        await answer
        return
    async with aclosing(answer):
        async for response in answer:
            await context.write(response)


class CallObserver(Protocol):
    """Is told of each call: at its start the method ("Generate"), at its end also the gRPC code's name ("OK"), the
    seconds, and the message to the client if it failed."""

    def started(self, method: str) -> None: ...

    def handled(self, method: str, code: str, seconds: float, error: str = "") -> None: ...


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Gives every call of the generation service the right status.

    - A message that protobuf cannot parse (for example text that is not UTF-8) becomes INVALID_ARGUMENT.
    - A TreelineError becomes its own status with details. The status of a failed upstream call passes unchanged.
    - Any other exception becomes INTERNAL. It is logged here under an id, and the client sees only the id.

    Handlers must be unary-unary coroutines or unary-stream async generators, which are closed when the call ends.
    """

    def __init__(self, *observers: CallObserver) -> None:
        self._observers = observers

    async def intercept_service(self, continuation: Callable, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        name = method.removeprefix(_PREFIX)
        parse = parsed_or_error(handler.request_deserializer or bytes)
        if handler.response_streaming:

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> None:
                async def answer() -> None:
                    await write_all(handler.unary_stream(_parsed(request), context), context)

                await self._finish(name, context, answer)

            return grpc.unary_stream_rpc_method_handler(stream, parse, handler.response_serializer)

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async def answer() -> Any:
                return await handler.unary_unary(_parsed(request), context)

            return await self._finish(name, context, answer)

        return grpc.unary_unary_rpc_method_handler(unary, parse, handler.response_serializer)

    async def _finish(self, method: str, context: grpc.aio.ServicerContext, answer: Callable[[], Any]) -> Any:
        code, told, started_s = grpc.StatusCode.OK, "", time.perf_counter()
        for observer in self._observers:
            observer.started(method)
        try:
            return await answer()
        except asyncio.CancelledError:
            code = _ended_early(context)
            raise
        except grpc.aio.InternalError:  # The call ended before a message was written.
            code = _ended_early(context)
        except TreelineError as error:
            code, told = code_of(error), str(error)
            await abort_with(context, error)
        except grpc.aio.AioRpcError as error:
            code, told = error.code(), error.details() or ""
            await abort_as(context, error)
        except Exception:
            code, error_id = grpc.StatusCode.INTERNAL, uuid.uuid4().hex
            told = f"internal error; the service's log has it as {error_id}"
            logger.exception("%s failed: %s", method, error_id)
            await abort_with(context, RequestBrokenError(told))
        finally:
            for observer in self._observers:
                observer.handled(method, code.name, time.perf_counter() - started_s, told)


def _ended_early(context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    left_s = context.time_remaining()
    out_of_time = left_s is not None and left_s <= DEADLINE_SLACK_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if out_of_time else grpc.StatusCode.CANCELLED


def _parsed(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise InvalidRequestError(FieldViolation("", MALFORMED))
    return request
