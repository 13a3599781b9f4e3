"""Errors in OpenAI's form."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import grpc
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from treeline.errors import InvalidRequestError, TreelineError
from treeline.rpc.status import RETRY_DELAY_S, code_of, retry_s

_Code = grpc.StatusCode
HTTP_STATUS = {
    _Code.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    _Code.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    _Code.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    _Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    _Code.ALREADY_EXISTS: HTTPStatus.CONFLICT,
    _Code.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    _Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    _Code.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}
"""Every other code is an INTERNAL_SERVER_ERROR."""
RETRYABLE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class ErrorResponse(JSONResponse):
    """An error in OpenAI's form. The access log gets its message, as `error` of the call's state."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = RETRY_DELAY_S,
    ) -> None:
        kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        headers = {"Retry-After": str(math.ceil(retry_after_s))} if status in RETRYABLE else {}
        super().__init__({"error": error_object(message, kind, param, code)}, status, headers)
        self._message = message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["error"] = self._message
        await super().__call__(scope, receive, send)


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


def failed(error: TreelineError) -> ErrorResponse:
    code = code_of(error)
    param = error.violations[0].field if isinstance(error, InvalidRequestError) and error.violations else None
    status = HTTP_STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR)
    return ErrorResponse(status, str(error), param, code.name.lower(), retry_s(error))
