"""`treeline bench transports`: what does the HTTP port cost over gRPC?"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DEFAULT_SERVER, JsonFile, Prompts, Server, Token
from treeline.client import TreelineClient


def transports(
    server: Server = DEFAULT_SERVER,
    http: Annotated[str, typer.Option(help="host:port of the same service's HTTP port.")] = "127.0.0.1:8000",
    streams: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Of four blocks each, behind a warm-up.")] = 5,
    per_stream: Annotated[int, typer.Option(min=1, help="Requests of each stream in a block.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 48,
    prompts: Prompts = None,
    token: Token = None,
    json_file: JsonFile = None,
) -> None:
    """Send the same requests to a running service over gRPC, HTTP, HTTP, gRPC, and compare."""
    from rich.console import Console

    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.service.transports import Block, rows_of, run_transports
    from cli.terminal import number, table

    asked, blocks = load_prompts(prompts or OWN_PROMPTS), []
    with TreelineClient(server, token, max_retries=0) as client:
        for run in run_transports(client, http, token, asked, streams, rounds, per_stream, max_tokens):
            blocks.append(run)
            round_, transport, block = run
            said = f"{block.tokens_per_s:.1f} tokens/s, first token after {block.ttft_ms:.1f} ms"
            typer.echo(f"round {round_}, {transport}: {said}", err=True)
    rows, cost = rows_of(blocks)
    cells = [[row["transport"], *(number(row[name]) for name in Block._fields)] for row in rows]
    Console().print(table(f"{streams} streams", ["transport", *Block._fields], cells))
    typer.echo(
        f"HTTP costs {100 * cost['http_tokens_per_s_cost']:.2f} % of tokens per second and "
        f"{cost['http_ttft_cost_ms']:.2f} ms of time to first token"
    )
    if json_file is not None:
        described = {"streams": streams, "rounds": rounds, "per_stream": per_stream, "max_tokens": max_tokens}
        write_report(json_file, described, rows, **cost)
