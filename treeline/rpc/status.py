"""TreelineErrors as gRPC statuses with details (google.rpc.Status), and back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from treeline.errors import (
    DrainingError,
    DuplicateRequestError,
    EngineFailedError,
    FieldViolation,
    InvalidRequestError,
    QueueFullError,
    QuotaExceededError,
    RequestBrokenError,
    RequestFailedError,
    StreamLostError,
    TreelineError,
    UnavailableError,
    UnknownModelError,
    UnknownRequestError,
)

DOMAIN = "treeline"
RETRY_DELAY_S = 1
DELIVERED = "delivered_tokens"
"""Metadata of STREAM_LOST's ErrorInfo: how many tokens the client had received."""
QUEUE_FULL = "QUEUE_FULL"
PUSHBACK = "grpc-retry-pushback-ms"
MAX_MESSAGE_CHARS = 1_000
"""A status travels in HTTP/2 trailers, which peers limit to a few kilobytes."""

D = TypeVar("D", bound=Message)
_Code = grpc.StatusCode
# The first class that fits an error gives its code and reason, so subclasses come first.
_ERRORS: list[tuple[type[TreelineError], grpc.StatusCode, str]] = [
    (InvalidRequestError, _Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (QueueFullError, _Code.RESOURCE_EXHAUSTED, QUEUE_FULL),
    (QuotaExceededError, _Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    (UnknownRequestError, _Code.NOT_FOUND, "UNKNOWN_REQUEST"),
    (UnknownModelError, _Code.NOT_FOUND, "UNKNOWN_MODEL"),
    (DuplicateRequestError, _Code.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    (DrainingError, _Code.UNAVAILABLE, "DRAINING"),
    (EngineFailedError, _Code.UNAVAILABLE, "ENGINE_FAILED"),
    (StreamLostError, _Code.UNAVAILABLE, "STREAM_LOST"),
    (UnavailableError, _Code.UNAVAILABLE, "UNAVAILABLE"),
    (RequestBrokenError, _Code.INTERNAL, "INTERNAL"),
    (TreelineError, _Code.INTERNAL, "INTERNAL"),
]
_BY_REASON = {reason: error for error, _, reason in _ERRORS if error is not TreelineError}
_GONE = (_Code.UNAVAILABLE, _Code.CANCELLED)
_RETRYABLE = (_Code.RESOURCE_EXHAUSTED, _Code.UNAVAILABLE)


def code_of(error: TreelineError) -> grpc.StatusCode:
    """The gRPC code that `error` becomes."""
    return next(code for kind, code, _ in _ERRORS if isinstance(error, kind))


def retry_s(error: TreelineError) -> float:
    """Seconds after which to retry a call that failed with RESOURCE_EXHAUSTED or UNAVAILABLE."""
    return error.retry_s if isinstance(error, QuotaExceededError) else RETRY_DELAY_S


def to_status(error: TreelineError) -> Status:
    """google.rpc.Status of an error: ErrorInfo always, field violations and a retry delay where they apply."""
    code, reason = next((code, reason) for kind, code, reason in _ERRORS if isinstance(error, kind))
    status = Status(code=code.value[0], message=_shortened(str(error)))
    facts = {DELIVERED: str(error.delivered_tokens)} if isinstance(error, StreamLostError) else {}
    status.details.add().Pack(ErrorInfo(reason=reason, domain=DOMAIN, metadata=facts))
    if isinstance(error, InvalidRequestError):
        violations = [
            BadRequest.FieldViolation(field=v.field, description=_shortened(v.description)) for v in error.violations
        ]
        status.details.add().Pack(BadRequest(field_violations=violations))
    if code in _RETRYABLE:
        delay = Duration()
        delay.FromTimedelta(timedelta(seconds=retry_s(error)))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status


async def abort_with(context: grpc.aio.ServicerContext, error: TreelineError) -> None:
    """End a call with `error`'s status. Returns, unlike `context.abort`; the handler has nothing left to do."""
    rich = rpc_status.to_status(to_status(error))
    delay_s = retry_s(error) if rich.code in _RETRYABLE else None
    await _abort(context, rich.code, rich.details, (*rich.trailing_metadata, *_pushback(delay_s)))


async def abort_as(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
    """End a call exactly as an upstream call ended: same code, message and details. Returns, like `abort_with`."""
    status = _status_of(error)
    trailers = rpc_status.to_status(status).trailing_metadata if status else ()
    await _abort(context, error.code(), error.details() or "", (*trailers, *_pushback(retry_delay_s(error))))


async def _abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, details: str, trailers: tuple) -> None:
    """grpc keeps, in the call, the error that `context.abort` raises. Its traceback's frames hold the call, which makes
    a cycle: refused requests, perhaps of megabytes, would stay until a collection, minutes later.
    """
    try:
        await context.abort(code, details, trailers)
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = aborted.__context__ = None


def from_rpc_error(error: Any) -> TreelineError:
    """The TreelineError behind a failed call (a grpc.RpcError) that was not cancelled from here.

    RequestFailedError if it is not one of ours.
    """
    code, message = error.code(), error.details() or ""
    info, bad_request = _detail(error, ErrorInfo()), _detail(error, BadRequest())
    kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if kind is InvalidRequestError:
        return InvalidRequestError(*(FieldViolation(v.field, v.description) for v in bad_request.field_violations))
    if kind is QuotaExceededError:
        return QuotaExceededError(message, _detail(error, RetryInfo()).retry_delay.ToTimedelta().total_seconds())
    if kind is StreamLostError:
        return StreamLostError(message, int(info.metadata[DELIVERED]))
    if code is _Code.DEADLINE_EXCEEDED and "deadline exceeded" in message.lower():
        message = "it took longer than its timeout"  # Not "Deadline Exceeded", which the code says already.
    if kind is None and code in _GONE:
        return UnavailableError(message)
    return kind(message) if kind else RequestFailedError(code.name, message)


def reason_of(error: Any) -> str:
    """The reason in a failed call's details ("DRAINING", "QUEUE_FULL", ...); empty if it has none."""
    return _detail(error, ErrorInfo()).reason


def retry_delay_s(error: Any) -> float | None:
    """Seconds after which the server of a failed call invites a retry, if it does."""
    info = _detail(error, RetryInfo())
    return info.retry_delay.ToTimedelta().total_seconds() if info.HasField("retry_delay") else None


def is_lost(error: Any) -> bool:
    """Whether a call failed because its server or connection was lost, so that another server may take it over."""
    code = error.code()
    # A server that is killed or removed resets its streams, which gives INTERNAL or CANCELLED. Our own INTERNAL errors
    # carry details. Do not ask about a call that this side cancelled.
    return code in _GONE or (code is _Code.INTERNAL and _status_of(error) is None)


def _pushback(delay_s: float | None) -> tuple[tuple[str, str], ...]:
    """The trailer that tells gRPC's own retries (examples/retries.json) the same as RetryInfo."""
    return () if delay_s is None else ((PUSHBACK, str(round(1000 * delay_s))),)


def _detail(error: Any, detail: D) -> D:
    """`detail` filled from the details of a failed call, or left empty."""
    for packed in (_status_of(error) or Status()).details:
        packed.Unpack(detail)  # does nothing for another type
    return detail


def _status_of(error: Any) -> Status | None:
    """The google.rpc.Status of a failed call; None without one, or if it is malformed or contradicts the call."""
    try:
        return rpc_status.from_call(error)
    except (ValueError, DecodeError):
        return None


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "…"
