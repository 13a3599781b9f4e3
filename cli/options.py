"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from treeline.errors import ConfigError

Number = TypeVar("Number", int, float)

Server = Annotated[str, typer.Option(envvar="TREELINE_SERVER", help="host:port of the service.")]
Token = Annotated[str | None, typer.Option(envvar="TREELINE_TOKEN", help="Bearer token.", show_default=False)]
TlsCa = Annotated[
    Path | None,
    typer.Option(envvar="TREELINE_TLS_CA", help="Certificate file to trust; without it, no TLS.", show_default=False),
]
PlaintextToken = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext-token",
        envvar="TREELINE_ALLOW_PLAINTEXT_TOKEN",
        help="Send the token beyond this machine without TLS.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; defaults where it says nothing.", show_default=False),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="JSON lines of {id, category, turns}; own prompts by default.", show_default=False),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here.", show_default=False)]


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Positive numbers separated by commas or spaces, in order, without repeats.

    Raises:
        ConfigError: something else is among them.
    """
    try:
        parsed = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{option} '{text}': numbers separated by spaces") from None
    if any(value <= 0 for value in parsed):
        raise ConfigError(f"{option} '{text}': numbers above 0")
    return tuple(dict.fromkeys(parsed))
