"""What the `treeline` command can do where treeline-serve is not installed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from treeline import __version__
from treeline.client import TreelineClient
from treeline.client.as_dict import as_dict
from treeline.client.base import DEFAULT_SERVER
from treeline.errors import ConfigError, TreelineError

SAMPLING = (("max-tokens", int), ("temperature", float), ("top-p", float), ("top-k", int), ("seed", int))


def client_command(arguments: Sequence[str]) -> int:
    """Run `generate`, `load` or `models` against a service; returns the exit status."""
    given = parser().parse_args(arguments)
    try:
        plaintext = given.allow_plaintext_token
        with TreelineClient(given.server, given.token, given.tls_ca, allow_plaintext_token=plaintext) as client:
            given.run(client, given)
    except KeyboardInterrupt:
        return 130
    except TreelineError as error:
        print(f"treeline: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def parser() -> argparse.ArgumentParser:
    service = argparse.ArgumentParser(add_help=False)
    environ = os.environ.get
    service.add_argument(
        "--server", default=environ("TREELINE_SERVER", DEFAULT_SERVER), help="host:port (default: %(default)s)"
    )
    service.add_argument("--token", default=environ("TREELINE_TOKEN"), help="bearer token")
    service.add_argument("--tls-ca", type=Path, default=environ("TREELINE_TLS_CA"), help="certificate file to trust")
    service.add_argument(
        "--allow-plaintext-token",
        action="store_true",
        default=bool(environ("TREELINE_ALLOW_PLAINTEXT_TOKEN")),
        help="send the token beyond this machine without TLS",
    )
    whole = argparse.ArgumentParser(
        "treeline", description="Client of a Treeline service. Running a service needs the package treeline-serve."
    )
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", parents=[service], help="stream an answer")
    generate.add_argument("prompt", help="what to say; - reads it from standard input")
    for name, kind in SAMPLING:
        generate.add_argument(f"--{name}", type=kind, help="the service's default if not given")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    generate.set_defaults(run=_generate)
    commands.add_parser("load", parents=[service], help="how busy the service is, as JSON").set_defaults(run=_load)
    commands.add_parser("models", parents=[service], help="what it serves, as JSON").set_defaults(run=_models)
    return whole


def _generate(client: TreelineClient, given: argparse.Namespace) -> None:
    text = sys.stdin.read() if given.prompt == "-" else given.prompt
    asked = {"prompt": text} if given.raw else {"messages": [{"role": "user", "content": text}]}
    sampling = {name.replace("-", "_"): getattr(given, name.replace("-", "_")) for name, _ in SAMPLING}
    for message in client.generate(**asked, **sampling):
        print(getattr(message, "text", "\n"), end="", flush=True)


def _load(client: TreelineClient, _: argparse.Namespace) -> None:
    print(json.dumps(as_dict(client.load()), indent=2))


def _models(client: TreelineClient, _: argparse.Namespace) -> None:
    print(json.dumps(as_dict(client.model_info()), indent=2))
