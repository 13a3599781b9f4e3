"""`treeline bench objectives`: is a latency objective held while the load steps?"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import ConfigFile, JsonFile, Prompts
from cli.serve import check_startable
from treeline.config_file import load_config


def objectives(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each of the ten steps of the load.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each answer.")] = 64,
    prompts: Prompts = None,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Start the service and a Prometheus, hold 1.3 times plain decoding's p95 at 4 streams, and stop Prometheus."""
    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.service.objectives import run_objectives
    from cli.terminal import number, show_table

    loaded, asked = load_config(config), load_prompts(prompts or OWN_PROMPTS)
    check_startable(loaded)
    rows, more = run_objectives(loaded, asked, seconds, max_tokens, lambda what: typer.echo(what, err=True))
    numbers = ("objective_ms", "p95_ms_clients", "p95_ms_prometheus", "settled_s", "swings")
    cells = [[row["arm"], str(row["streams"]), *(number(row[name]) for name in numbers)] for row in rows]
    show_table("Inter-token latency, 95th percentile", ["arm", "streams", *numbers], cells)
    typer.echo(f"seconds until plans rest on step records without Prometheus, and on it again: {more['outage']}")
    if json_file is not None:
        described = {"seconds": seconds, "max_tokens": max_tokens, "treeline": loaded.model_dump(mode="json")}
        write_report(json_file, described, rows, **more)
