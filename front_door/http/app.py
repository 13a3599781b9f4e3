"""OpenAI's API over the same `FrontDoor` as gRPC, the page, and what operators poll. The verifier checks requests."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from front_door.access import AccessLog
from front_door.http.answers import HttpCall, answer
from front_door.http.errors import ErrorResponse, failed
from front_door.http.guard import JSON, Guard
from front_door.http.openai_requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from front_door.http.openai_responses import ChatDialect, CompletionDialect
from front_door.service import FrontDoor
from treeline.errors import TreelineError
from treeline.rpc.channels import DiscoverPages
from treeline.rpc.status import from_rpc_error
from treeline.rpc.tokens import TokenFile
from treeline.v1 import generation_pb2 as pb

PAGE = Path(__file__).parent.parent / "page"
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'"}


def create_app(
    door: FrontDoor,
    registry: CollectorRegistry,
    tokens: TokenFile | None,
    max_body_bytes: int,
    pages: DiscoverPages,
    access: AccessLog,
) -> FastAPI:
    """The HTTP application. With `tokens`, all but `OPEN_PATHS` need one of them as a bearer token."""
    app = FastAPI(title="Treeline", docs_url=None, redoc_url=None, exception_handlers=HANDLERS)
    app.add_middleware(Guard, tokens=tokens, max_body_bytes=max_body_bytes, access=access)
    app.mount("/page", StaticFiles(directory=PAGE))
    _serve_models(app, door)
    _serve_operators(app, door, registry, pages)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    return app


def _serve_models(app: FastAPI, door: FrontDoor) -> None:
    """Routes of OpenAI's API, and vLLM's for token ids."""

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(door, ChatDialect(), body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(door, CompletionDialect(), body, request)

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


def _serve_operators(app: FastAPI, door: FrontDoor, registry: CollectorRegistry, pages: DiscoverPages) -> None:
    """Routes that balancers, Prometheus and operators poll."""

    @app.get("/load")
    async def load(request: Request) -> dict[str, Any]:
        now = await door.GetLoad(pb.GetLoadRequest(), HttpCall(request))
        return {field.name: getattr(now, field.name) for field in now.DESCRIPTOR.fields}

    @app.get("/health")
    async def health() -> Response:
        serving = bool(door.pool.serving) and not door.draining
        return PlainTextResponse("SERVING\n" if serving else "NOT_SERVING\n", 200 if serving else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/targets")
    async def targets() -> list[dict[str, Any]]:
        """For Prometheus' HTTP service discovery: the metrics pages of all replicas, which move."""
        found = await pages()
        return [{"targets": sorted(found[service]), "labels": {"service": service}} for service in found]


async def _refused(request: Request, error: TreelineError) -> Response:
    return failed(error)


async def _refused_upstream(request: Request, error: grpc.aio.AioRpcError) -> Response:
    return failed(from_rpc_error(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    return ErrorResponse(HTTPStatus(error.status_code), str(error.detail))


async def _malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    match first:
        case {"type": "json_invalid", "loc": ("body", int(place)), "ctx": {"error": why}}:
            sent = f"it came as {request.state.sent_as}, {JSON} is wanted"
            return ErrorResponse(HTTPStatus.BAD_REQUEST, f"body: not JSON ({why} at character {place}); {sent}")
    field = ".".join(str(part) for part in first["loc"][1:])
    return ErrorResponse(HTTPStatus.BAD_REQUEST, f"{field or 'body'}: {first['msg']}", field or None)


HANDLERS: dict[Any, Any] = {
    TreelineError: _refused,
    grpc.aio.AioRpcError: _refused_upstream,
    HTTPException: _http_error,
    RequestValidationError: _malformed,
}
"""Handlers by the error that ended the call."""
