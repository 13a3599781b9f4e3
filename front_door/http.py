"""The clients' HTTP port: OpenAI's API over the same `FrontDoor` as gRPC. What is asked is checked by the verifier."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from front_door.access import AccessLog
from front_door.openai_requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from front_door.openai_responses import ChatDialect, CompletionDialect, Dialect, Reply
from front_door.service import FrontDoor
from treeline.config import ServerConfig
from treeline.errors import ConfigError, InvalidRequestError, TreelineError
from treeline.request import answers_of, index_of
from treeline.rpc.channels import DiscoverPages, family_of
from treeline.rpc.merged import merged
from treeline.rpc.status import RETRY_DELAY_S, code_of, from_rpc_error, retry_s
from treeline.rpc.tokens import TokenFile
from treeline.v1 import generation_pb2 as pb

PAGE = Path(__file__).parent / "page"
OPEN_PATHS = ("/", "/health")
"""Need no token, and nor do the page's files: the page asks its reader for one, and orchestrators ask for health."""
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'"}
START_TIMEOUT_S = 10.0
DISCONNECT_POLL_S = 0.1
"""How often a client that waits for a whole answer is looked for: a dropped connection ends its request this soon."""
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
CLIENT_GONE = "499"
"""In the log, the status of a call whose client hung up before the answer, as nginx has it."""
MAX_LOGGED_CHARS = 200
"""Of method and path in the log: anybody may send paths of 64 KiB."""
RETRYABLE = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class HttpCall:
    """An HTTP call as `FrontDoor` sees it: without a deadline, since its client hangs up instead."""

    def __init__(self, call: Request) -> None:
        self._call = call

    def time_remaining(self) -> float | None:
        return None

    def peer(self) -> str:
        client = self._call.client
        return f"http:[{client.host}]:{client.port}" if client else ""

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return [*self._call.headers.items()]

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """OpenAI's API has no resuming by the client."""


class HttpServer:
    """The HTTP port, listening. `port`: where."""

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
        # Opened here: where uvicorn can't listen it exits, which would leave a replica without its event loop.
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


def create_app(
    door: FrontDoor,
    registry: CollectorRegistry,
    tokens: TokenFile | None,
    max_body_bytes: int,
    pages: DiscoverPages,
    access: AccessLog,
) -> FastAPI:
    """The HTTP application. With `tokens`, all but `OPEN_PATHS` ask for one of them as a bearer token."""
    app = FastAPI(title="Treeline", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, tokens=tokens, max_body_bytes=max_body_bytes, access=access)

    @app.exception_handler(TreelineError)
    async def treeline_error(request: Request, error: TreelineError) -> Response:
        return _failed(error)

    @app.exception_handler(grpc.aio.AioRpcError)
    async def upstream_error(request: Request, error: grpc.aio.AioRpcError) -> Response:
        return _failed(from_rpc_error(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(HTTPStatus(error.status_code), str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return error_response(HTTPStatus.BAD_REQUEST, f"{field or 'body'}: {first['msg']}", field or None)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _answer(door, ChatDialect(), body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(door, CompletionDialect(), body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
        context = HttpCall(request)
        info = await door.GetModelInfo(pb.GetModelInfoRequest(), context)
        ids = (await door.Tokenize(body.request(info.tool_call_format), context)).token_ids
        return {"tokens": list(ids), "count": len(ids), "max_model_len": info.max_context_tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
        asked = pb.DetokenizeRequest(token_ids=body.tokens)
        return {"prompt": (await door.Detokenize(asked, HttpCall(request))).text}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        info = await door.GetModelInfo(pb.GetModelInfoRequest(), HttpCall(request))
        model = {"id": info.model, "object": "model", "created": 0, "owned_by": "treeline"}
        ours = {
            "default_policy": info.default_policy,
            "policies": list(info.allowed_policies),
            "default_sampling": {field.name: value for field, value in info.default_sampling.ListFields()},
            "eos_token_ids": list(info.eos_token_ids),
        }
        return {"object": "list", "data": [model | {"max_model_len": info.max_context_tokens, "treeline": ours}]}

    @app.get("/load")
    async def load(request: Request) -> dict[str, Any]:
        now = await door.GetLoad(pb.GetLoadRequest(), HttpCall(request))
        return {field.name: getattr(now, field.name) for field in now.DESCRIPTOR.fields}

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/health")
    async def health() -> Response:
        serving = bool(door.pool.serving) and not door.draining
        return PlainTextResponse("SERVING\n" if serving else "NOT_SERVING\n", 200 if serving else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/targets")
    async def targets() -> list[dict[str, Any]]:
        """Of Prometheus' HTTP service discovery: the metrics pages of all replicas, which move."""
        found = await pages()
        return [{"targets": sorted(found[service]), "labels": {"service": service}} for service in found]

    return app


def error_response(
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: float = RETRY_DELAY_S,
) -> Response:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    headers = {"Retry-After": str(math.ceil(retry_after_s))} if status in RETRYABLE else {}
    return JSONResponse({"error": _error(message, kind, param, code)}, status, headers)


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


def _failed(error: TreelineError) -> Response:
    code = code_of(error)
    param = error.violations[0].field if isinstance(error, InvalidRequestError) and error.violations else None
    status = HTTP_STATUS.get(code, HTTPStatus.INTERNAL_SERVER_ERROR)
    return error_response(status, str(error), param, code.name.lower(), retry_s(error))


async def _answer(door: FrontDoor, dialect: Dialect, body: ChatBody | CompletionBody, call: Request) -> Response:
    request_id, context = call.state.request_id, HttpCall(call)
    info = await door.GetModelInfo(pb.GetModelInfoRequest(), context)
    requests = body.requests(request_id, info.tool_call_format)
    headers = {"x-treeline-ignored": ", ".join(body.ignored)} if body.ignored else {}
    texts = [""] * len(requests)
    if isinstance(body, CompletionBody) and body.echo:
        texts = await asyncio.gather(*(_text_of(door, request, context) for request in requests))
    echoed = [text for text in texts for _ in range(body.n)]
    reply = Reply(dialect, request_id, info.model, echoed, body.finders(info.tool_call_format))
    if not body.stream:
        answers = await _unless_gone(call, asyncio.ensure_future(_collected(door, requests, context)))
        return JSONResponse(reply.whole(answers), headers=headers)
    responses = _merged(door, requests, context)
    first = await anext(responses)  # what is refused at once is refused with its own status
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    events = _events(reply, first, responses, include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers | {"Cache-Control": "no-cache"})


async def _text_of(door: FrontDoor, request: pb.GenerateRequest, context: HttpCall) -> str:
    """The prompt of a text completion."""
    if request.HasField("prompt"):
        return request.prompt
    return (await door.Detokenize(pb.DetokenizeRequest(token_ids=request.token_ids.ids), context)).text


async def _unless_gone(call: Request, work: asyncio.Future[Any]) -> Any:
    """The result of `work`, which is cancelled when the client hangs up."""
    try:
        while not (await asyncio.wait((work,), timeout=DISCONNECT_POLL_S))[0]:
            if await call.is_disconnected():
                raise asyncio.CancelledError
        return work.result()
    finally:
        work.cancel()


async def _collected(
    door: FrontDoor, requests: list[pb.GenerateRequest], context: HttpCall
) -> list[list[pb.GenerateResponse]]:
    """All responses of each answer. If one fails, all of them end."""
    answers: list[list[pb.GenerateResponse]] = [[] for request in requests for _ in range(answers_of(request))]
    async with aclosing(_merged(door, requests, context)) as responses:  # type: ignore[type-var]
        async for index, response in responses:
            answers[index].append(response)
    return answers


Indexed = tuple[int, pb.GenerateResponse]


async def _merged(door: FrontDoor, requests: list[pb.GenerateRequest], context: HttpCall) -> AsyncIterator[Indexed]:
    """The responses of all requests as they come, each with its answer's index. Closing it aborts them all."""
    async with aclosing(merged([door.Generate(request, context) for request in requests])) as responses:
        async for place, response in responses:
            yield place * answers_of(requests[0]) + index_of(response), response


async def _events(
    reply: Reply, first: Indexed, rest: AsyncIterator[Indexed], include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first one is an event of its own, since the status is already sent."""
    begun: set[int] = set()
    completes: list[pb.GenerateComplete] = []

    def event(index: int, response: pb.GenerateResponse) -> bytes:
        if response.HasField("complete"):
            completes.append(response.complete)
        chunk = reply.chunk(index, response, index not in begun)
        begun.add(index)
        return _event(chunk)

    async with aclosing(rest):  # type: ignore[type-var]
        try:
            yield event(*first)
            async for index, response in rest:
                yield event(index, response)
            if include_usage:
                yield _event(reply.usage_chunk(completes))
        except (TreelineError, grpc.aio.AioRpcError) as error:
            said = error if isinstance(error, TreelineError) else from_rpc_error(error)
            yield _event({"error": _error(str(said), "server_error", code=code_of(said).name.lower())})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
