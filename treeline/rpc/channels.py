"""The gRPC channels and servers of all services: TLS, bearer tokens, keepalive and limits."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from treeline.errors import ConfigError
from treeline.rpc.interceptors import METHODS, MessageGuard
from treeline.rpc.tokens import TOKEN_NEEDED, TokenFile, authorization

if TYPE_CHECKING:
    from grpc_health.v1 import health

    from treeline.config import InternalConfig, ServerConfig, TlsConfig

Discover = Callable[[], Awaitable[list[str]]]
"""Finds the live "host:port" endpoints of a service; called again whenever they may have changed."""
Refused = Callable[[str, grpc.aio.ServicerContext], None]
"""Called for each refused call, with its method ("Generate") and context."""
DiscoverPages = Callable[[], Awaitable[dict[str, list[str]]]]
"""Finds the "host:port" of the metrics pages of all replicas, by service."""
OWN_ADDRESS = "TREELINE_ADDRESS"
"""Environment variable: the address at which other nodes reach this one, if a server listens on all interfaces."""

HEALTH_PREFIX = "/grpc.health.v1.Health/"
"""Health checks need no token, so that orchestrators can make them."""

MAX_INTERNAL_RPCS = 1024
INTERNAL_BACKOFF_MS = 250
"""Longest pause between attempts to reach a lost service: streams may wait for it, and an attempt costs a refused
connection."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]


def message_limits(max_message_bytes: int) -> list[tuple[str, int]]:
    """Channel options that bound a message in both directions."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


def client_options(max_message_bytes: int, max_backoff_ms: int = 2_000) -> list[tuple[str, int]]:
    """Options of every client channel; a lost peer is tried again after 0.1 s, then less and less often."""
    backoff = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", max_backoff_ms)]
    return [*message_limits(max_message_bytes), *_KEEPALIVE, *backoff]


def connect(endpoint: str, internal: InternalConfig, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel from one service to another, with the deployment's certificate and token if there are any.

    Raises:
        ConfigError: a certificate or token file cannot be read.
    """
    options = [*client_options(max_message_bytes, INTERNAL_BACKOFF_MS), ("grpc.enable_http_proxy", 0)]
    interceptors = bearer_interceptors(TokenFile(internal.token_file)) if internal.token_file else None
    if internal.tls is None:
        return grpc.aio.insecure_channel(endpoint, options, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(_read(internal.tls.certificate))
    return grpc.aio.secure_channel(endpoint, credentials, options, interceptors=interceptors)


def new_server(
    access: ServerConfig | InternalConfig,
    max_message_bytes: int,
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    refused: Refused | None = None,
    max_concurrent_rpcs: int = MAX_INTERNAL_RPCS,
) -> grpc.aio.Server:
    """A server that asks for `access`'s token (if any) before `interceptors` see the call. Not yet listening.

    Calls beyond `max_concurrent_rpcs` get RESOURCE_EXHAUSTED. `refused` is called for each call of the generation
    service without a valid token.

    Raises:
        ConfigError: the token file cannot be read or holds no token.
    """
    guards = [TokenInterceptor(TokenFile(access.token_file), refused)] if access.token_file else []
    options = [
        *message_limits(max_message_bytes),
        *_KEEPALIVE,
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]
    return grpc.aio.server(
        interceptors=[*guards, MessageGuard(), *interceptors],
        options=options,
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def bind(server: grpc.aio.Server, access: ServerConfig | InternalConfig, port: int = 0) -> str:
    """Let `server` listen on `access.host`; port 0 takes any free one. Returns "host:port" as others reach it.

    Raises:
        ConfigError: the port is taken, or a TLS file cannot be read.
    """
    address = f"{_bracketed(access.host)}:{port}"
    try:
        if access.tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _server_credentials(access.tls))
    except RuntimeError:
        raise ConfigError(f"cannot listen on {address}: is the port taken?") from None
    return f"{_bracketed(reachable_host(access.host))}:{bound}"


async def add_standard_services(server: grpc.aio.Server, service: str) -> health.aio.HealthServicer:
    """Put the standard health and reflection services beside `service` (its full name) on a server.

    Returns the health service, whose statuses (of "" and of `service`) begin as SERVING.
    """
    # Imported here because a client installs without them.
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    health_servicer = health.aio.HealthServicer()
    await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return health_servicer


def freeze_started() -> None:
    """Exempt all live objects from garbage collection. Call it once, when the server has started.

    Otherwise Python runs a full collection only once new objects are a quarter of the old ones. It takes a good part of
    a second, and until then a process keeps tens of MiB of ended calls. After the freeze it takes 2 ms, so every second
    turn may be one instead of every tenth: in a loop that leaves 400,000 small cycles, at most 14,000 objects waited,
    not 107,000, for less time in all.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # Recounts the old objects, of which a quarter is the limit.
    gc.set_threshold(*gc.get_threshold()[:2], 1)


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory, for messages of megabytes. Other C libraries are left alone.

    By default it returns such blocks, and the system clears their pages at every use. Packing 4.7 MB of features, of
    four new prompts, took 11 ms that way and now takes 3, while the engine waits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it accepts
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reachable_host(host: str) -> str:
    """`host`, or this machine's own address if `host` stands for all interfaces."""
    if host not in ("0.0.0.0", "::", "[::]"):
        return host
    if address := os.environ.get(OWN_ADDRESS):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which interface leads out
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid bearer token (UNAUTHENTICATED), except health checks.

    It comes first, and refuses without reading a message, so that a call without a token costs next to nothing.
    """

    def __init__(self, tokens: TokenFile, refused: Refused | None) -> None:
        self._tokens, self._refused = tokens, refused

    async def intercept_service(self, continuation: Callable, handler_call_details: grpc.HandlerCallDetails) -> Any:
        details = handler_call_details
        if details.method.startswith(HEALTH_PREFIX) or self._tokens.client(authorization(details.invocation_metadata)):
            return await continuation(details)
        method = details.method.rpartition("/")[2]

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            if self._refused and details.method in METHODS:  # an invented name must not become a metric's label
                self._refused(method, context)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{TOKEN_NEEDED} (metadata 'authorization')")

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Bearer:
    """Sends the first valid token of a file with every call of a channel."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def _intercept(self, continuation: Callable, client_call_details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()))
        metadata["authorization"] = f"Bearer {self._tokens.token}"
        return await continuation(client_call_details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = _intercept
    intercept_stream_unary = intercept_stream_stream = _intercept


def bearer_interceptors(tokens: TokenFile) -> list[grpc.aio.ClientInterceptor]:
    """One `_Bearer` for each kind of call: grpc.aio files an interceptor under the first kind it is an instance of."""
    kinds = (
        grpc.aio.UnaryUnaryClientInterceptor,
        grpc.aio.UnaryStreamClientInterceptor,
        grpc.aio.StreamUnaryClientInterceptor,
        grpc.aio.StreamStreamClientInterceptor,
    )
    return [type("Bearer", (_Bearer, kind), {})(tokens) for kind in kinds]


def _server_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(_read(tls.private_key), _read(tls.certificate))])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _bracketed(host: str) -> str:
    """IPv6 addresses need brackets before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
