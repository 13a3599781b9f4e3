"""`treeline bench objectives`: is a latency objective held while the load steps?"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import ConfigFile, JsonFile, Prompts
from cli.serve import check_startable
from treeline.config_file import load_config

ACCEPTANCE = "0.72,0.12,0.05,0.03"
"""As in `treeline simulate` (EAGLE3_LIKE): trees then pay at 4 streams. With the default drafter they hardly do."""


def objectives(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each of the ten steps of the load.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each answer.")] = 256,
    acceptance: Annotated[
        str, typer.Option(help="Of drafts, as in `bench sweep`; '' for those of the configured drafter.")
    ] = ACCEPTANCE,
    prompts: Prompts = None,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Hold 1.3 times plain decoding's p95 at 4 streams, compare with no objective, and stop Prometheus."""
    from bench.common import load_prompts, write_report
    from bench.service.objectives import run_objectives
    from bench.synthetic import parse_acceptance
    from cli.terminal import number, show_table

    drafts = parse_acceptance(acceptance) if acceptance else None
    loaded, asked = load_config(config), load_prompts(prompts)
    check_startable(loaded)
    rows, more = run_objectives(loaded, asked, seconds, max_tokens, drafts, lambda what: typer.echo(what, err=True))
    numbers = ("objective_ms", "p95_ms_clients", "p95_ms_prometheus", "settled_s", "swings")
    cells = [[row["arm"], str(row["streams"]), *(number(row[name]) for name in numbers)] for row in rows]
    show_table("Inter-token latency, 95th percentile", ["arm", "streams", *numbers], cells)
    typer.echo(f"seconds until plans rest on step records without Prometheus, and on it again: {more['outage']}")
    described = {"seconds": seconds, "max_tokens": max_tokens, "acceptance": acceptance}
    write_report(json_file, described | {"treeline": loaded.model_dump(mode="json")}, rows, **more)
