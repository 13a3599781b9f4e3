"""`treeline bench shifts`: do trees settle behind a step of the load, and predictions beside a CPU hog?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile, JsonFile, Limit, Prompts
from treeline.config import load_config

if TYPE_CHECKING:
    from bench.shifts_report import HogRow, LoadRow

PHASES = 6


def shifts(
    config: ConfigFile = None,
    streams: Annotated[int, typer.Option(min=2, help="That the load jumps to, from one, and back.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each phase, once all its streams decode.")] = 8.0,
    hog_streams: Annotated[int, typer.Option(min=1, help="That run while the CPU hogs come and go.")] = 4,
    hogs: Annotated[
        int | None, typer.Option(min=1, help="Processes that spin; one for each core by default.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Before, beside and after the CPU hogs, each.")] = 150,
    max_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each answer.")] = 256,
    acceptance: Annotated[
        str | None, typer.Option(help="Draft synthetically, as for `treeline bench sweep`.", show_default=False)
    ] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the run into this picture (.png, .svg, .pdf).")] = None,
) -> None:
    """Let the load jump from one stream to many and back, then let CPU hogs come and go, under `smart`.

    Tells how long the tree sizes take to settle, and how many steps the predicted step times take to be right again.
    """
    from dataclasses import asdict

    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.shifts import run_hogs, run_load
    from bench.shifts_plot import check_picture, plot_shifts
    from bench.shifts_report import hog_rows, load_rows
    from bench.synthetic import parse_acceptance
    from bench.systems import start_planned
    from cli.shown import Counted
    from lm.cpu.threads import own_cores

    loaded, texts = load_config(config), load_prompts(prompts or OWN_PROMPTS, limit)
    drafts = parse_acceptance(acceptance) if acceptance else None
    if plot is not None:
        check_picture(plot)
    hogs = hogs or os.cpu_count() or 1
    with Counted("loading and profiling") as bar:
        bar.expect(PHASES)
        planned, token_ids = start_planned(loaded, texts, max(streams, hog_streams), max_tokens, drafts)
        encoded = list(token_ids.values())
        with own_cores(planned.engine.model.device):
            load_steps = run_load(planned, encoded, streams, seconds, max_tokens, bar.begin)
            hog_steps = run_hogs(planned, encoded, hog_streams, hogs, steps, max_tokens, bar.begin)
    load, beside = load_rows(load_steps), hog_rows(hog_steps)
    _show(load, beside)
    if json_file is not None:
        described = {"config": loaded.model_dump(mode="json"), "streams": streams, "seconds": seconds}
        described |= {"hog_streams": hog_streams, "hogs": hogs, "steps": steps, "max_tokens": max_tokens}
        described |= {"acceptance": acceptance, "prompts": len(texts)}
        more = {
            "hogs": [asdict(row) for row in beside],
            "load_steps": [asdict(step) for step in load_steps],
            "hog_steps": [asdict(step) for step in hog_steps],
        }
        write_report(json_file, described, [asdict(row) for row in load], **more)
    if plot is not None:
        plot_shifts(plot, load_steps, hog_steps)


def _show(load: list[LoadRow], beside: list[HogRow]) -> None:
    from rich.console import Console

    from cli.shown import number, table

    console = Console()
    headings = ["phase", "step,\nms", "nodes", "all decode\nafter, s", "settled\nafter, s", "once all\ndecode, s"]
    headings += ["swings", "out,\n%"]
    lines = [
        [
            row.phase,
            number(row.step_ms),
            f"{row.nodes:.1f} ± {row.band:.1f}",
            number(row.all_decoding_s),
            _or_never(row.settled_s),
            _or_never(row.settled_decoding_s),
            str(row.swings),
            number(100 * row.outside_share),
        ]
        for row in load
    ]
    console.print(table("tree sizes behind a step of the load", headings, lines))
    headings = ["part", "step,\nms", "slowed\ndown", "good after\nsteps", "for the\nfirst time"]
    headings += ["bad after\n50, %", "error,\n%"]
    lines = [
        [
            row.phase,
            number(row.step_ms),
            number(row.slowdown, 2),
            _or_never(row.good_after_steps, 0),
            _or_never(row.first_good_after_steps, 0),
            number(None if row.outside_share is None else 100 * row.outside_share),
            number(100 * row.error),
        ]
        for row in beside
    ]
    console.print(table("predicted step times beside CPU hogs", headings, lines))


def _or_never(value: float | None, digits: int = 1) -> str:
    from cli.shown import number

    return "never" if value is None else number(value, digits)
