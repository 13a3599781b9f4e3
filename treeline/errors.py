"""Errors a caller can act on. Each maps to one gRPC status code at the border (see `treeline/rpc/status.py`)."""

from __future__ import annotations

from dataclasses import dataclass


class TreelineError(Exception):
    """Base of the errors that users see as one clear line."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request: its path in the message and what is wrong with it."""

    field: str
    description: str


class InvalidRequestError(TreelineError):
    """INVALID_ARGUMENT: the request cannot succeed unless it changes."""

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))


class QueueFullError(TreelineError):
    """RESOURCE_EXHAUSTED: the waiting queue is full; try again later."""


class QuotaExceededError(TreelineError):
    """RESOURCE_EXHAUSTED: this client exceeded its quota; try again after `retry_s` seconds."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        self.retry_s = retry_s
        super().__init__(message)


class UnknownRequestError(TreelineError):
    """NOT_FOUND: the caller has no such request open."""


class UnknownModelError(TreelineError):
    """NOT_FOUND: no such model is served here."""


class DuplicateRequestError(TreelineError):
    """ALREADY_EXISTS: a request with this id is running or waiting."""


class UnavailableError(TreelineError):
    """UNAVAILABLE: no server can take the request now; try again later."""


class DrainingError(UnavailableError):
    """UNAVAILABLE: this replica is shutting down; another one can take the request."""


class EngineFailedError(UnavailableError):
    """UNAVAILABLE: the verifier's engine failed while it had the request; another replica can take it over."""


class StreamLostError(UnavailableError):
    """UNAVAILABLE: a stream lost its verifier and could not be resumed in time."""

    def __init__(self, message: str, delivered_tokens: int) -> None:
        self.delivered_tokens = delivered_tokens
        super().__init__(message)


class RequestBrokenError(TreelineError):
    """INTERNAL: the service failed on this request; the message names the id in its log."""


class RequestFailedError(TreelineError):
    """Any other failure of a call, as a client sees it; `code` is the gRPC status code's name."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{code}: {message}" if message else code)


class ConfigError(TreelineError):
    """A configuration file or a model cannot be used."""
