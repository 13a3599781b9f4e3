"""`treeline bench prune`: what the planning of a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prune(
    requests: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = 32,
    nodes: Annotated[int, typer.Option(min=1, max=256, help="Draft nodes of each.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the random trees.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Time the planner's fast path on one core: no model is loaded."""
    from rich.console import Console
    from rich.table import Table

    from bench.common import write_report
    from bench.prune import run_prune

    rows = run_prune(requests, nodes, repeats, seed)
    table = Table(title=f"{requests} requests of {nodes} nodes, microseconds a step")
    for heading in ("what", "median", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        table.add_row(row["what"], f"{row['us']:.0f}", f"{row['us_min']:.0f}", f"{row['us_max']:.0f}")
    Console().print(table)
    if json_file is not None:
        write_report(json_file, {"requests": requests, "nodes": nodes, "repeats": repeats, "seed": seed}, rows)
