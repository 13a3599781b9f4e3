"""What both clients share: their settings and the requests they send."""

from __future__ import annotations

import ipaddress
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import grpc

from treeline.client.attempts import Attempts, Servers
from treeline.errors import ConfigError
from treeline.request import GenerateOptions, generate_request, identify
from treeline.rpc.channels import client_options
from treeline.v1 import generation_pb2 as pb

DEFAULT_SERVER = "127.0.0.1:50051"
"""Where `treeline serve` listens by default: server.host and server.port."""
MAX_MESSAGE_BYTES = 4 << 20
CALL_TIMEOUT_S = 10.0

AnswerT = TypeVar("AnswerT")
Message = pb.GenerateChunk | pb.GenerateComplete
ChatMessages = Sequence[Mapping[str, Any]]


class BaseClient(ABC, Generic[AnswerT]):
    """Talks to front doors, or to a verifier directly. Failed calls raise TreelineErrors.

    A stream whose front door goes away resumes through the same or another one; each token is delivered once.

    Args:
        targets: one or several "host:port"; one at a time is used.
        token: bearer token, if the server asks for one.
        tls_ca: certificate file to trust; without it the connection is not encrypted.
        resume_wait_s: how long a broken stream looks for a server that resumes it.
        max_retries: how often a call that failed before its first token is retried, after the delay that the server
            named. An unreachable server names none.
        allow_plaintext_token: send the token over unencrypted connections that leave this machine.

    Raises:
        ConfigError: the certificate cannot be read, or the token would leave this machine in plain text.
    """

    _transport: ClassVar[Any]
    """The module that makes channels: grpc or grpc.aio."""

    def __init__(
        self,
        targets: str | Sequence[str],
        token: str | None = None,
        tls_ca: Path | None = None,
        resume_wait_s: float = 60.0,
        max_retries: int = 2,
        allow_plaintext_token: bool = False,
    ) -> None:
        credentials = None
        if tls_ca is not None:
            try:
                credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes())
            except OSError as error:
                raise ConfigError(f"cannot read {tls_ca}: {error.strerror}") from None
        self._servers = Servers([targets] if isinstance(targets, str) else list(targets))
        exposed = [target for target in self._servers.targets if not _is_local(target)]
        if token and credentials is None and exposed and not allow_plaintext_token:
            raise ConfigError(f"the token would go to {exposed[0]} in plain text: set tls_ca, or allow_plaintext_token")
        options = client_options(MAX_MESSAGE_BYTES)
        self._channels = [self._connect(target, credentials, options) for target in self._servers.targets]
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._resume_wait_s, self._max_retries = resume_wait_s, max_retries

    @property
    def target(self) -> str:
        """The "host:port" in use."""
        return self._servers.target

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: ChatMessages | None = None,
        token_ids: Sequence[int] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        add_generation_prompt: bool | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AnswerT:
        """Stream an answer: chunks as they are produced, then one GenerateComplete. `.text()` gives the whole text.

        With `n`, the messages of that many answers are interleaved, each with its index; `.texts()` gives all texts.

        Give exactly one of `prompt`, `messages` ({"role", "content"} each, plus what else the chat template reads) and
        `token_ids`; the other arguments are `GenerateOptions`. Closing the answer (or leaving its loop)
        aborts the request.

        Raises:
            TypeError: an option is unknown, or a value's type does not fit its field.
            ValueError: none or several inputs are given, or a value does not fit its field.
            InvalidRequestError, QueueFullError, UnknownModelError, DuplicateRequestError, UnavailableError: as named.
            RequestFailedError: any other failure; `.code` is "DEADLINE_EXCEEDED", "CANCELLED", "UNAUTHENTICATED", ...
        """
        if unknown := options.keys() - GenerateOptions.__optional_keys__:
            raise TypeError(f"generate() has no argument {min(unknown)!r}")
        if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
            raise ValueError("give exactly one of prompt, messages and token_ids")
        request = generate_request(
            prompt=prompt,
            token_ids=None if token_ids is None else pb.TokenIds(ids=token_ids),
            chat=chat_of(messages, template_arguments, continue_final_message, add_generation_prompt),
            **options,
        )
        identify(request)
        return self._stream(request, timeout_s)

    def _connect(self, target: str, credentials: grpc.ChannelCredentials | None, options: Sequence[Any]) -> Any:
        """A channel to `target`."""
        if credentials is None:
            return self._transport.insecure_channel(target, options)
        return self._transport.secure_channel(target, credentials, options)

    @abstractmethod
    def _stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> AnswerT:
        """The answer to a request with an id and a seed."""

    @property
    def _channel(self) -> Any:
        """The channel in use."""
        return self._channels[self._servers.current]

    def _attempts(self, request: pb.GenerateRequest | None, timeout_s: float | None) -> Attempts:
        return Attempts(self._servers, request, timeout_s, self._resume_wait_s, self._max_retries)


def chat_of(
    messages: ChatMessages | None,
    template_arguments: Mapping[str, Any] | None = None,
    continue_final_message: bool | None = None,
    add_generation_prompt: bool | None = None,
) -> pb.Chat | None:
    """A chat in the contract's form: message fields other than role and content become JSON."""
    if messages is None:
        return None
    turn: dict[str, Any] = {
        "continue_final_message": continue_final_message,
        "add_generation_prompt": add_generation_prompt,
    }
    return pb.Chat(
        messages=[
            pb.ChatMessage(role=m["role"], content=m.get("content") or "", fields=_json(m, {"role", "content"}))
            for m in messages
        ],
        template_arguments=_json(template_arguments or {}),
        **turn,
    )


def texts_of(messages: Iterable[Message]) -> list[str]:
    """The whole text of each answer."""
    texts: defaultdict[int, str] = defaultdict(str)
    for message in messages:
        texts[message.index] += message.text if isinstance(message, pb.GenerateChunk) else ""
    return [texts[index] for index in sorted(texts)]


def _json(fields: Mapping[str, Any], known: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    return json.dumps({name: fields[name] for name in fields.keys() - known}) if fields.keys() - known else ""


def _is_local(target: str) -> bool:
    """Whether `target` is on this machine."""
    host = target.rpartition(":")[0].strip("[]")
    try:
        return target.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
