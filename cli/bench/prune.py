"""`treeline bench prune`: what the planning of a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treeline.errors import ConfigError

MOST = 4096


def prune(
    requests: Annotated[str, typer.Option(help="Requests in the batch; several, separated by spaces.")] = "1 8 32",
    nodes: Annotated[str, typer.Option(help="Draft nodes of each; several, separated by spaces.")] = "16 64",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the random trees.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Time the planner's fast path on one core: no model is loaded."""
    from rich.console import Console

    from bench.common import write_report
    from bench.prune import run_prune

    batches, sizes = _numbers("--requests", requests), _numbers("--nodes", nodes)
    with Console(stderr=True).status("timing"):
        rows = list(run_prune(batches, sizes, repeats, seed))
    typer.echo("| requests | nodes of each | what | median us | lowest | highest |\n|---|---|---|---|---|---|")
    for row in rows:
        typer.echo(
            f"| {row['requests']} | {row['nodes']} | {row['what']} "
            f"| {row['us']:.0f} | {row['us_min']:.0f} | {row['us_max']:.0f} |"
        )
    if json_file is not None:
        write_report(json_file, {"requests": batches, "nodes": sizes, "repeats": repeats, "seed": seed}, rows)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= MOST for number in numbers):
        raise ConfigError(f"{option} '{text}': whole numbers from 1 to {MOST}, separated by spaces")
    return numbers
