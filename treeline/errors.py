"""Errors a caller can act on. Each maps to one gRPC status code at the border (see `verifier_svc/status.py`)."""

from __future__ import annotations

from dataclasses import dataclass


class TreelineError(Exception):
    """Base of the errors that are shown to users as one clear line."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request: its path in the message and what is wrong with it."""

    field: str
    description: str


class InvalidRequestError(TreelineError):
    """INVALID_ARGUMENT: the request can never succeed as it is."""

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))


class QueueFullError(TreelineError):
    """RESOURCE_EXHAUSTED: the waiting queue is full; try again later."""


class UnknownModelError(TreelineError):
    """NOT_FOUND: no such model is served here."""


class DrainingError(TreelineError):
    """UNAVAILABLE: this replica is shutting down; another one will take the request."""


class ConfigError(TreelineError):
    """A configuration file or a model that cannot be used."""
