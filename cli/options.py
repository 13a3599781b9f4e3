"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_SERVER = "127.0.0.1:50051"

Server = Annotated[str, typer.Option(envvar="TREELINE_SERVER", help="host:port of the service.")]
Token = Annotated[str | None, typer.Option(envvar="TREELINE_TOKEN", help="Bearer token.", show_default=False)]
TlsCa = Annotated[
    Path | None,
    typer.Option(envvar="TREELINE_TLS_CA", help="Certificate file to trust; without it, no TLS.", show_default=False),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; defaults where it says nothing.", show_default=False),
]
