"""`treeline bench`: measurements that can be repeated. Each one lives in a file of its own."""

from __future__ import annotations

import typer

from cli.bench.lossless import lossless
from cli.bench.objectives import objectives
from cli.bench.peers import peers
from cli.bench.step import step
from cli.bench.sweep import sweep

bench = typer.Typer(
    help="Measurements that can be repeated. Run them on an otherwise idle machine.", no_args_is_help=True
)
bench.command()(step)
bench.command()(peers)
bench.command()(lossless)
bench.command()(sweep)
bench.command()(objectives)
