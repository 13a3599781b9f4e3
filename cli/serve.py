"""`treeline serve`: the whole service on this machine or cluster."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from cli.options import ConfigFile
from treeline.config import Config
from treeline.config_file import load_config
from treeline.errors import ConfigError
from treeline.rpc.channels import family_of
from treeline.rpc.tokens import read_tokens


def serve(
    config: ConfigFile = None,
    port: Annotated[int | None, typer.Option(help="gRPC port, in place of server.port.", show_default=False)] = None,
    http_port: Annotated[
        int | None, typer.Option(help="HTTP port, in place of server.http.port.", show_default=False)
    ] = None,
) -> None:
    """Start all services on Ray Serve and keep them running until Ctrl-C.

    A start that fails says why in one line (exit 2); most mistakes are found before anything starts.
    """
    ports = {"server.port": port, "server.http.port": http_port}
    checked = load_config(config, {name: value for name, value in ports.items() if value is not None})
    check_startable(checked)
    typer.echo("loading Ray", err=True)
    from deploy.run import run

    run(checked, block=True, report=lambda phase: typer.echo(phase, err=True))


def check_startable(config: Config) -> None:
    """Find out, without starting anything, what would keep the services from starting. Fetches missing models.

    Raises:
        ConfigError: with what is wrong first.
    """
    check_policies(config)
    for path in (config.server.token_file, config.internal.token_file, config.metrics.token_file):
        if path is not None:
            read_tokens(path)
    for tls in (config.server.tls, config.internal.tls):
        for file in (tls.certificate, tls.private_key) if tls else ():
            if not file.is_file():
                raise ConfigError(f"no such TLS file: {file}")
    check_port_free(config.server.host, config.server.port, "server.port")
    if config.server.http.enabled:
        check_port_free(config.server.host, config.server.http.port, "server.http.port")
    from lm.store import check_tokenizer, resolve_model

    for model in (config.verifier.target, config.drafter.model):
        if model is not None:
            check_tokenizer(resolve_model(model.model))


def check_policies(config: Config) -> None:
    """Raises ConfigError if a policy of the configuration is unknown, or the default is not allowed."""
    from planner.policies import parse_policy

    verifier = config.verifier
    named = [entry for entry in verifier.allowed_policies if not entry.endswith(":")]
    for spec in (verifier.default_policy, *named):
        try:
            parse_policy(spec)
        except ValueError as error:
            raise ConfigError(f"verifier policies: {error}") from None


def check_port_free(host: str, port: int, setting: str) -> None:
    """Raises ConfigError, naming the setting, if nothing can listen there."""
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; see {setting}") from None
