"""Chat and text completions: one whole JSON answer, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from front_door.http.errors import error_object
from front_door.http.openai_requests import ChatBody, CompletionBody
from front_door.http.openai_responses import Dialect, Reply
from front_door.service import FrontDoor
from treeline.errors import TreelineError
from treeline.request import answers_of, index_of
from treeline.rpc.merged import merged
from treeline.rpc.status import code_of, from_rpc_error
from treeline.v1 import generation_pb2 as pb

DISCONNECT_POLL_S = 0.1
"""How often to check for a client that waits for a whole answer: a dropped connection ends its request this soon."""


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


async def answer(door: FrontDoor, dialect: Dialect, body: ChatBody | CompletionBody, call: Request) -> Response:
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
    first = await anext(responses)  # an immediate refusal gets its own status
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
            yield _event({"error": error_object(str(said), "server_error", code=code_of(said).name.lower())})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
