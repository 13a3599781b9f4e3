"""The client of the generation service."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from treeline.errors import ConfigError, StreamLostError, UnavailableError, UnknownRequestError
from treeline.request import identify
from treeline.rpc.channels import client_options
from treeline.rpc.status import from_rpc_error, is_lost
from treeline.v1 import generation_pb2 as pb
from treeline.v1.generation_pb2_grpc import GenerationServiceStub

MAX_MESSAGE_BYTES = 4 << 20
CALL_TIMEOUT_S = 10.0
RETRY_S = 0.2
"""Between rounds over all servers while a broken stream looks for one."""


class TreelineClient:
    """Talks to front doors, or to a verifier directly. Failed calls raise TreelineErrors.

    A stream whose front door goes away resumes through the same or another one; each token comes once.

    Args:
        targets: one or several "host:port"; one at a time is used.
        token: bearer token, if the server asks for one.
        tls_ca: certificate file to trust; without it the connection is not encrypted.
        resume_wait_s: how long a broken stream looks for a server that resumes it.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        token: str | None = None,
        tls_ca: Path | None = None,
        resume_wait_s: float = 60.0,
    ) -> None:
        credentials = None
        if tls_ca is not None:
            try:
                credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes())
            except OSError as error:
                raise ConfigError(f"cannot read {tls_ca}: {error.strerror}") from None
        self._targets = [targets] if isinstance(targets, str) else list(targets)
        options = client_options(MAX_MESSAGE_BYTES)
        self._channels = [
            grpc.secure_channel(target, credentials, options) if credentials else grpc.insecure_channel(target, options)
            for target in self._targets
        ]
        self._current = 0
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._resume_wait_s = resume_wait_s

    @property
    def target(self) -> str:
        """The "host:port" in use."""
        return self._targets[self._current]

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        include_stop: bool = False,
        ignore_eos: bool = False,
        min_tokens: int | None = None,
        skip_special_tokens: bool = True,
        logprobs: int | None = None,
        grammar: pb.Grammar | None = None,
        explain: bool = False,
        policy: str | None = None,
        max_nodes: int | None = None,
        max_depth: int | None = None,
        priority: int = 0,
        target_time_per_output_token_ms: float | None = None,
        model: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[pb.GenerateChunk | pb.GenerateComplete]:
        """Stream an answer: chunks as they are produced, then one GenerateComplete.

        Exactly one of `prompt`, `messages` ({"role", "content"} each) and `token_ids` is needed; the other arguments
        are the fields of GenerateRequest, left to the server's defaults where None. Closing the iterator (or leaving
        its loop) aborts the request.

        Raises:
            ValueError: none or several inputs are given, or a value does not fit its field.
            InvalidRequestError, QueueFullError, UnknownModelError, DuplicateRequestError, UnavailableError: as named.
            RequestFailedError: any other failure; `.code` is "DEADLINE_EXCEEDED", "CANCELLED", "UNAUTHENTICATED", ...
        """
        if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
            raise ValueError("give exactly one of prompt, messages and token_ids")
        request = pb.GenerateRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            token_ids=None if token_ids is None else pb.TokenIds(ids=token_ids),
            chat=None if messages is None else _chat(messages),
            sampling=pb.SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                seed=seed,
            ),
            stopping=pb.StoppingParams(
                max_tokens=max_tokens,
                stop=stop,
                stop_token_ids=stop_token_ids,
                include_stop=include_stop,
                ignore_eos=ignore_eos,
                min_tokens=min_tokens,
            ),
            output=pb.OutputOptions(logprobs=logprobs, explain=explain, skip_special_tokens=skip_special_tokens),
            speculation=pb.SpeculationOptions(policy=policy, max_nodes=max_nodes, max_depth=max_depth),
            priority=priority,
            grammar=grammar,
            target_time_per_output_token_ms=target_time_per_output_token_ms,
        )
        return self._stream(request, timeout_s)

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

    def tokenize(self, prompt: str | None = None, *, messages: Sequence[Mapping[str, str]] | None = None) -> list[int]:
        """The token ids of a text or a chat, as `generate` uses them."""
        chat = None if messages is None else _chat(messages)
        return list(self._call("Tokenize", pb.TokenizeRequest(prompt=prompt, chat=chat)).token_ids)

    def close(self) -> None:
        """Ends open streams too."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> TreelineClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(
        self, request: pb.GenerateRequest, timeout_s: float | None
    ) -> Iterator[pb.GenerateChunk | pb.GenerateComplete]:
        identify(request)
        started_s = time.monotonic()
        lost_s, failures = None, 0  # since the last message: when the stream broke, and failed calls
        while True:
            left_s = None if timeout_s is None else max(0.0, started_s + timeout_s - time.monotonic())
            call = self._stub.Generate(request, timeout=left_s, metadata=self._metadata)
            try:
                for response in call:
                    lost_s, failures = None, 0
                    if not request.resume.token_ids:
                        request.resume.time_to_first_token_s = time.monotonic() - started_s
                    request.resume.token_ids.extend(response.chunk.token_ids)
                    yield response.chunk if response.HasField("chunk") else response.complete
                return
            except grpc.RpcError as error:
                problem, is_open = self._error(error), error.code() is grpc.StatusCode.ALREADY_EXISTS
                # A server that has not noticed the lost connection still has the request open.
                if not (is_lost(error) or (is_open and failures)) or isinstance(problem, StreamLostError):
                    raise problem from None
            finally:
                call.cancel()
            lost_s, failures = lost_s or time.monotonic(), failures + 1
            waited_s = time.monotonic() - lost_s
            # Without any token there is nothing to resume: each server is tried once.
            if waited_s > self._resume_wait_s or (not request.resume.token_ids and failures >= len(self._targets)):
                raise problem
            self._use_next()
            request.resume.elapsed_s = time.monotonic() - started_s
            time.sleep(RETRY_S if failures >= len(self._targets) else 0)

    @property
    def _stub(self) -> GenerationServiceStub:
        return GenerationServiceStub(self._channels[self._current])

    def _use_next(self) -> None:
        self._current = (self._current + 1) % len(self._targets)

    def _call(self, method: str, request: Any) -> Any:
        """The answer of the first reachable server."""
        for tries_left in reversed(range(len(self._targets))):
            try:
                return getattr(self._stub, method)(request, timeout=CALL_TIMEOUT_S, metadata=self._metadata)
            except grpc.RpcError as error:
                if not (tries_left and is_lost(error)):
                    raise self._error(error) from None
                self._use_next()
        raise AssertionError("unreachable: the last try returns or raises")

    def _error(self, error: Any) -> Exception:
        if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
            # The transport failed, not the service.
            return UnavailableError(f"cannot reach {self.target}: {(error.details() or '').rpartition(': ')[2]}")
        return from_rpc_error(error)


def _chat(messages: Sequence[Mapping[str, str]]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages])
