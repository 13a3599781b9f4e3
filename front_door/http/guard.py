"""What every HTTP call passes first: the token, the bound of the body, the access log."""

from __future__ import annotations

import time
import uuid
from http import HTTPStatus
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from front_door.access import AccessLog
from front_door.http.errors import error_response
from treeline.rpc.tokens import TokenFile

OPEN_PATHS = ("/", "/health")
"""Need no token, and nor do the page's files: the page asks its reader for one, and orchestrators ask for health."""
CLIENT_GONE = "499"
"""In the log, the status of a call whose client hung up before the answer, as nginx has it."""
MAX_LOGGED_CHARS = 200
"""Of method and path in the log: anybody may send paths of 64 KiB."""


class Guard:
    """Asks for a bearer token and bounds the body, before anything is parsed. Names and logs every call."""

    def __init__(self, app: ASGIApp, tokens: TokenFile | None, max_body_bytes: int, access: AccessLog) -> None:
        self._app, self._tokens, self._max_body_bytes, self._access = app, tokens, max_body_bytes, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers, path = Headers(scope=scope), scope["path"]
        is_open = path in OPEN_PATHS or path.startswith("/page/")
        request_id = scope.setdefault("state", {})["request_id"] = headers.get("x-request-id") or uuid.uuid4().hex
        method = f"{scope['method']} {quote(path)}"[:MAX_LOGGED_CHARS]
        code, started_s = CLIENT_GONE, time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._access.started(method)
        try:
            await self._guarded(scope, receive, named, is_open)
        finally:
            address = (scope.get("client") or ("",))[0]
            told = {"address": address, "request_id": request_id[:MAX_LOGGED_CHARS]}
            self._access.handled(method, code, time.perf_counter() - started_s, quiet=is_open, **told)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, is_open: bool) -> None:
        headers = Headers(scope=scope)
        if not (is_open or self._tokens is None or self._tokens.client(headers.get("authorization", ""))):
            return await error_response(HTTPStatus.UNAUTHORIZED, "a valid bearer token is needed")(scope, receive, send)
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                problem = f"a body may have {self._max_body_bytes} bytes (limits.max_message_bytes)"
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem)
            return message

        await self._app(scope, bounded, send)
