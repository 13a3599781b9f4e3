"""`treeline bench`: measurements that can be repeated. Each one lives in a file of its own."""

from __future__ import annotations

import typer

from cli.bench_lossless import lossless

bench = typer.Typer(
    help="Measurements that can be repeated. Run them on an otherwise idle machine.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """Keeps `treeline bench lossless` a subcommand while it is the only one."""


bench.command()(lossless)
