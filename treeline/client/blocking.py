"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar

import grpc

from treeline.client.attempts import Attempts
from treeline.client.base import CALL_TIMEOUT_S, BaseClient, ChatMessages, Message, chat_of, texts_of
from treeline.errors import UnknownRequestError
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub


class Answer(Iterator[Message]):
    """The messages of one answer, as they come."""

    def __init__(self, messages: Generator[Message, None, None]) -> None:
        self._messages = messages

    def __next__(self) -> Message:
        return next(self._messages)

    def text(self) -> str:
        """The whole text (of the first answer, with `n`), once it has ended."""
        return self.texts()[0]

    def texts(self) -> list[str]:
        """The whole text of each of `n` answers."""
        return texts_of(self)

    def close(self) -> None:
        """Abort the request."""
        self._messages.close()


class TreelineClient(BaseClient[Answer]):
    __doc__ = BaseClient.__doc__
    _transport: ClassVar[Any] = grpc

    def abort(self, *request_ids: str) -> int:
        """End requests by id. Returns how many of them were open."""
        try:
            return self._call("Abort", pb.AbortRequest(request_ids=request_ids)).aborted
        except UnknownRequestError:
            return 0

    def load(self) -> pb.GetLoadResponse:
        """How busy the service is."""
        return self._call("GetLoad", pb.GetLoadRequest())

    def plans(self) -> list[pb.VerifierPlan]:
        """The plan in force at each verifier, and why it is as it is."""
        return list(self._call("GetPlan", pb.GetPlanRequest()).plans)

    def model_info(self) -> pb.GetModelInfoResponse:
        """What is served."""
        return self._call("GetModelInfo", pb.GetModelInfoRequest())

    def tokenize(self, prompt: str | None = None, *, messages: ChatMessages | None = None) -> list[int]:
        """The token ids of a text or a chat, as `generate` uses them."""
        return list(self._call("Tokenize", pb.TokenizeRequest(prompt=prompt, chat=chat_of(messages))).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._call("Detokenize", pb.DetokenizeRequest(token_ids=token_ids)).text

    def close(self) -> None:
        """Ends open streams too."""
        self._servers.closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> TreelineClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> Answer:
        return Answer(self._messages(request, self._attempts(request, timeout_s)))

    def _messages(self, request: pb.GenerateRequest, attempts: Attempts) -> Generator[Message, None, None]:
        while True:
            stub = GenerationServiceStub(self._channel)
            call = stub.Generate(request, timeout=attempts.left_s, metadata=self._metadata)
            try:
                for response in call:
                    yield attempts.message(response)
                return
            except grpc.RpcError as error:
                if attempts.ended:
                    return
                wait_s = attempts.failed(error)
            finally:
                call.cancel()
            time.sleep(wait_s)

    def _call(self, method: str, request: Any) -> Any:
        attempts = self._attempts(None, CALL_TIMEOUT_S)
        while True:
            call = getattr(GenerationServiceStub(self._channel), method)
            try:
                return call(request, timeout=attempts.left_s, metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.failed(error))
