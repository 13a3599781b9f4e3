"""`treeline serve`: the whole service on this machine or cluster."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError, safe_open

from cli.options import ConfigFile
from treeline.config import Config
from treeline.config_file import load_config
from treeline.errors import ConfigError
from treeline.rpc.channels import family_of
from treeline.rpc.tokens import read_tokens

GGUF_MAGIC = b"GGUF"


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
        ConfigError: names the first problem.
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
    target = check_model(config.verifier.target.model)
    if config.drafter.model is not None:
        check_model(config.drafter.model.model)
    if config.drafter.head is not None and (config.drafter.kind == "auto" or "head" in config.drafter.kind):
        check_head(str(config.drafter.head), tuple(config.drafter.head_layers or ()), target)


def check_model(spec: str) -> Path:
    """The folder of a model whose files can be opened. Weights are not read.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    from lm.store import check_tokenizer, one_line, resolve_model

    path = Path(spec).expanduser()
    if path.suffix == ".gguf" and path.is_file() and path.open("rb").read(len(GGUF_MAGIC)) != GGUF_MAGIC:
        raise ConfigError(f"model file '{path}' is no GGUF file")
    file = path / "config.json"
    try:
        if file.is_file():
            json.loads(file.read_text())
        folder = resolve_model(spec)
        check_tokenizer(folder)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "np"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot read {file}: {one_line(error)}") from None
    return folder


def check_head(spec: str, feature_layers: tuple[int, ...], target: Path) -> None:
    """Raises ConfigError, naming the head, unless its shapes fit the target's, as far as both are known."""
    from lm.checkpoints.eagle3 import check_files, read_config
    from lm.store import one_line, resolve_head

    folder = resolve_head(spec)
    told = json.loads((target / "config.json").read_text())
    told = told.get("text_config", told)
    try:
        head = read_config(folder, told.get("num_hidden_layers", 0), feature_layers)
        check_files(folder)
    except ConfigError:
        raise
    except Exception as error:  # a folder of something else raises anything
        raise ConfigError(f"cannot load the draft head {folder}: {one_line(error)}") from None
    wanted, served = (
        (head.target_hidden_size, head.target_vocab_size),
        (told.get("hidden_size"), told.get("vocab_size")),
    )
    if None not in served and wanted != served:
        raise ConfigError(
            f"the draft head {folder} is for a target of hidden size {wanted[0]} and {wanted[1]} tokens, "
            f"not for {target.name} ({served[0]}, {served[1]})"
        )


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
