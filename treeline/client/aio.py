"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar

import grpc

from treeline.client.attempts import Attempts
from treeline.client.base import CALL_TIMEOUT_S, BaseClient, ChatMessages, Message, chat_of, texts_of
from treeline.errors import UnknownRequestError
from treeline.rpc.reading import messages_of
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub


class AsyncAnswer(AsyncIterator[Message]):
    """The messages of one answer, as they come."""

    def __init__(self, messages: AsyncGenerator[Message, None]) -> None:
        self._messages = messages

    async def __anext__(self) -> Message:
        return await anext(self._messages)

    async def text(self) -> str:
        """The whole text (of the first answer, with `n`), once it has ended."""
        return (await self.texts())[0]

    async def texts(self) -> list[str]:
        """The whole text of each of `n` answers."""
        return texts_of([message async for message in self])

    async def aclose(self) -> None:
        """Abort the request."""
        await self._messages.aclose()


class AsyncClient(BaseClient[AsyncAnswer]):
    __doc__ = BaseClient.__doc__
    _transport: ClassVar[Any] = grpc.aio

    async def abort(self, *request_ids: str) -> int:
        """End requests by id. Returns how many of them were open."""
        try:
            return (await self._call("Abort", pb.AbortRequest(request_ids=request_ids))).aborted
        except UnknownRequestError:
            return 0

    async def load(self) -> pb.GetLoadResponse:
        """How busy the service is."""
        return await self._call("GetLoad", pb.GetLoadRequest())

    async def plans(self) -> list[pb.VerifierPlan]:
        """The plan in force at each verifier, and why it is as it is."""
        return list((await self._call("GetPlan", pb.GetPlanRequest())).plans)

    async def model_info(self) -> pb.GetModelInfoResponse:
        """What is served."""
        return await self._call("GetModelInfo", pb.GetModelInfoRequest())

    async def tokenize(self, prompt: str | None = None, *, messages: ChatMessages | None = None) -> list[int]:
        """The token ids of a text or a chat, as `generate` uses them."""
        asked = pb.TokenizeRequest(prompt=prompt, chat=chat_of(messages))
        return list((await self._call("Tokenize", asked)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return (await self._call("Detokenize", pb.DetokenizeRequest(token_ids=token_ids))).text

    async def close(self) -> None:
        """Ends open streams too."""
        self._servers.closed = True
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncAnswer:
        return AsyncAnswer(self._messages(request, self._attempts(request, timeout_s)))

    async def _messages(self, request: pb.GenerateRequest, attempts: Attempts) -> AsyncGenerator[Message, None]:
        while True:
            stub = GenerationServiceStub(self._channel)
            call = stub.Generate(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                async with aclosing(messages_of(call)) as responses:
                    async for response in responses:
                        yield attempts.message(response)
                return
            except grpc.RpcError as error:
                if attempts.ended:
                    return
                wait_s = attempts.failed(error)
            await asyncio.sleep(wait_s)

    async def _call(self, method: str, request: Any) -> Any:
        attempts = self._attempts(None, CALL_TIMEOUT_S)
        while True:
            call = getattr(GenerationServiceStub(self._channel), method)
            try:
                return await call(request, timeout=attempts.left_s, metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.failed(error))
