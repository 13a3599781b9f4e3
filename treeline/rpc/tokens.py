"""Bearer tokens: a file with one per line, and what the client behind each may do."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from treeline.errors import ConfigError
from treeline.request import MAX_PRIORITY

logger = logging.getLogger(__name__)

TOKEN_NEEDED = "a valid bearer token is needed"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Client:
    """A caller. Tokens of the same name are one client.

    Attributes:
        name: how verifiers and logs know the client; never the token.
        weight: its share of the service when others wait, relative to theirs; above 0.
        rate: requests per second; one second's worth may come at once.
        concurrent: requests open at a time, through one front door.
        priority: the highest it may ask for.
        expires_unix_s: from then on the token is invalid.
    """

    name: str
    weight: float = 1.0
    rate: float = math.inf
    concurrent: float = math.inf
    priority: int = MAX_PRIORITY
    expires_unix_s: float = math.inf


def authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The value of the "authorization" header in a call's metadata; empty if there is none."""
    given = next((value for key, value in metadata or () if key == "authorization"), "")
    return given if isinstance(given, str) else given.decode("latin-1")


def read_clients(path: Path) -> dict[str, Client]:
    """The client of each token in a file. A line is a token, then `option=value` pairs, separated by spaces.

    Options: name, weight, rate, concurrent, priority, expires (an ISO 8601 date or time, UTC unless it says
    otherwise). Empty lines and lines that begin with # are ignored.

    Raises:
        ConfigError: the file cannot be read, holds no token, or a line has a wrong option.
    """
    try:
        lines = path.read_bytes().decode("ascii", "replace").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    clients = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and not line.lstrip().startswith("#"):
            try:
                clients[words[0]] = _client(words[0], words[1:])
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
    if not clients:
        raise ConfigError(f"{path} holds no token")
    return clients


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file that have not expired, in order.

    Raises:
        ConfigError: as `read_clients`, or all have expired.
    """
    now = time.time()
    tokens = [token for token, client in read_clients(path).items() if now < client.expires_unix_s]
    if not tokens:
        raise ConfigError(f"every token of {path} has expired")
    return tokens


class TokenFile:
    """The tokens of a file, read again when it changes; while it cannot be read, the last ones remain valid."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError if the file cannot be read, holds no token, or an option is wrong."""
        self._path, self._clock = path, clock
        self._stamp, self._clients = self._seen(), read_clients(path)

    @property
    def token(self) -> str:
        """The first token that has not expired, to send to others. The first of all if every one has expired."""
        clients, now = self._current(), self._clock()
        return next((token for token, client in clients.items() if now < client.expires_unix_s), next(iter(clients)))

    def client(self, authorization: str) -> Client | None:
        """The client whose token an "authorization" header holds; None if the token is unknown or has expired."""
        scheme, _, given = authorization.partition(" ")
        shown = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every token is compared, so that the time taken says nothing about which one came close.
        known = self._current().items()
        found = [client for token, client in known if hmac.compare_digest(shown, token.encode())]
        return found[0] if found and self._clock() < found[0].expires_unix_s else None

    def _current(self) -> dict[str, Client]:
        if (stamp := self._seen()) != self._stamp:
            self._stamp = stamp
            try:
                self._clients = read_clients(self._path)
            except ConfigError as error:
                logger.warning("keeping the last tokens: %s", error)
        return self._clients

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _unix_s(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_OPTIONS: dict[str, tuple[Callable[[str], Any], Callable[[Any], object]]] = {
    "name": (str, _NAME.fullmatch),
    "weight": (float, lambda value: 0 < value < math.inf),
    "rate": (float, lambda value: 0 < value < math.inf),
    "concurrent": (int, lambda value: value >= 1),
    "priority": (int, lambda value: abs(value) <= MAX_PRIORITY),
    "expires": (_unix_s, lambda value: True),
}
"""How each option is parsed and checked."""


def _client(token: str, options: list[str]) -> Client:
    values: dict[str, Any] = {"name": hashlib.sha256(token.encode()).hexdigest()[:16]}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in _OPTIONS:
            raise ValueError(f"expected {', '.join(_OPTIONS)}, each with =value, behind the token")
        read, fits = _OPTIONS[key]
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise ValueError(f"{key} cannot be {text!r}")
        values["expires_unix_s" if key == "expires" else key] = value
    return Client(**values)
