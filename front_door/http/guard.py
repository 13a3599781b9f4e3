"""What every HTTP call passes first: token check, body limit, access log."""

from __future__ import annotations

import time
import uuid
from http import HTTPStatus
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from front_door.access import AccessLog
from front_door.http.errors import ErrorResponse
from treeline.rpc.tokens import TOKEN_NEEDED, TokenFile

OPEN_PATHS = ("/", "/health")
"""They need no token, nor do the page's files: the page asks its reader for one, and orchestrators check health."""
CLIENT_GONE = "499"
"""Logged status of a call whose client hung up before the answer, as in nginx."""
JSON = "application/json"
MAX_LOGGED_CHARS = 200
"""Limit of method and path in the log: anybody may send paths of 64 KiB."""


class Guard:
    """Checks the bearer token and limits the body before anything is parsed. Gives every call an id and a log line."""

    def __init__(self, app: ASGIApp, tokens: TokenFile | None, max_body_bytes: int, access: AccessLog) -> None:
        self._app, self._tokens, self._max_body_bytes, self._access = app, tokens, max_body_bytes, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers, path, state = Headers(scope=scope), scope["path"], scope.setdefault("state", {})
        is_open = path in OPEN_PATHS or path.startswith("/page/")
        request_id = state["request_id"] = headers.get("x-request-id") or uuid.uuid4().hex
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
        except Exception as error:  # Starlette answers outside of here, and uvicorn logs the stack trace.
            code, state["error"] = "500", type(error).__name__
            raise
        finally:
            seconds, address = time.perf_counter() - started_s, (scope.get("client") or ("",))[0]
            known = {"address": address, "request_id": request_id[:MAX_LOGGED_CHARS]}
            self._access.handled(method, code, seconds, state.get("error", ""), quiet=is_open, **known)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, is_open: bool) -> None:
        headers = Headers(scope=scope)
        if not (is_open or self._tokens is None or self._tokens.client(headers.get("authorization", ""))):
            return await ErrorResponse(HTTPStatus.UNAUTHORIZED, TOKEN_NEEDED)(scope, receive, send)
        if problem := _take_as_json(scope):
            return await ErrorResponse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem)(scope, receive, send)
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


def _take_as_json(scope: Scope) -> str:
    """Have the body of a POST read as JSON, whatever its content type: curl calls it a form unless told otherwise.

    A browser's page must declare JSON. Browsers send forms and plain text to any site, with the page's `Origin`,
    without asking that site first: any page could use its readers' services.

    Returns:
        What is wrong with the content type; empty if nothing is.
    """
    headers = MutableHeaders(scope=scope)
    given = headers.get("content-type", "")[:MAX_LOGGED_CHARS]
    scope["state"]["sent_as"] = given or "no content type"
    kind = given.partition(";")[0].strip().lower()
    if scope["method"] != "POST" or kind == JSON or (kind.startswith("application/") and kind.endswith("+json")):
        return ""
    if "origin" in headers:
        return f"the body came as {scope['state']['sent_as']}; send it with Content-Type: {JSON}"
    headers["content-type"] = JSON
    return ""
