"""`treeline bench`: measurements that can be repeated. Each one lives in a file of its own."""

from __future__ import annotations

import typer

from cli.bench_engine import engine
from cli.bench_lossless import lossless
from cli.bench_peers import peers
from cli.bench_prune import prune
from cli.bench_shifts import shifts
from cli.bench_step import step
from cli.bench_sweep import sweep

bench = typer.Typer(
    help="Measurements that can be repeated. Run them on an otherwise idle machine.", no_args_is_help=True
)
bench.command()(step)
bench.command()(engine)
bench.command()(peers)
bench.command()(lossless)
bench.command()(prune)
bench.command()(sweep)
bench.command()(shifts)
