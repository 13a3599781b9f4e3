"""`treeline bench step`: what a verification pass costs, and how near that is to what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile
from treeline.config import load_config

if TYPE_CHECKING:
    from rich.console import Console

    from bench.step import StepResult


def step(
    config: ConfigFile = None,
    drafter: Annotated[
        str | None, typer.Option(help="Measure this draft model's passes too; the configuration's drafter by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four points of the grid only.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each system at each point.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the passes into this picture (.png, .svg, .pdf).")] = None,
) -> None:
    """Time passes over 1 to 64 tokens of 1 to 16 sequences, ours and transformers' in turns, and the machine's limit.

    Shows the phases in which the time is spent as well. Takes a few minutes for the default model on two cores.
    """
    loaded = load_config(config)
    draft = loaded.drafter.model
    if drafter is not None:
        draft = loaded.verifier.target.model_copy(update={"model": drafter, "name": None})

    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bench.common import write_report
    from bench.step import QUICK, grid, head_subject, model_subject, run_step
    from drafter_svc.drafter import find_head
    from lm.draft_head import DraftHead

    console = Console()
    points = list(QUICK) if quick else grid()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        subjects = [model_subject("target", loaded.verifier.target)]
        if draft is not None:
            subjects.append(model_subject("drafter", draft))
        elif (folder := find_head(loaded.drafter, loaded.verifier.target)) is not None:
            head = DraftHead.load(folder, loaded.verifier.target)
            subjects.append(head_subject(head, subjects[0].max_context_tokens))
        bar.update(task, total=2 + len(points) * len(subjects))
        result = run_step(subjects, points, repeats, lambda what: bar.update(task, advance=1, description=what))
    _show(console, result)
    if json_file is not None:
        described = {"config": loaded.model_dump(mode="json"), "repeats": repeats}
        more = {"limit": result.limit_json(), "phases": [asdict(row) for row in result.phases]}
        write_report(json_file, described, [asdict(row) for row in result.rows], **more)
    if plot is not None:
        from bench.step_plot import plot_step

        plot_step(result.rows, plot)


def _show(console: Console, result: StepResult) -> None:
    from rich.table import Table

    limit = result.limit
    console.print(f"this machine reads {limit.read_gb_s:.1f} GB/s and multiplies {limit.gemm_gflop_s:.0f} GFLOP/s")
    for model in dict.fromkeys(row.model for row in result.rows):
        table = Table(title=f"{model}: milliseconds of a pass")
        for heading in ("context", "sequences", "tokens", "limit", "ours", "transformers", "ours /\ntheirs"):
            table.add_column(heading, justify="right")
        for row in result.rows:
            if row.model == model:
                ratio = None if row.transformers_ms is None else row.ours_ms / row.transformers_ms
                times = map(_number, (row.limit_ms, row.ours_ms, row.transformers_ms))
                table.add_row(str(row.context), str(row.sequences), str(row.tokens), *times, _number(ratio, 2))
        console.print(table)
    for model, system in dict.fromkeys((part.model, part.system) for part in result.phases):
        table = Table(title=f"{model}, {system}: where one sequence's milliseconds go")
        for heading in ("context", "tokens", "linear", "attention", "norm,\nrotary", "head", "sampling", "Python"):
            table.add_column(heading, justify="right")
        for part in result.phases:
            if (part.model, part.system, part.sequences) == (model, system, 1):
                spent = (part.linear_ms, part.attention_ms, part.norm_rotary_ms, part.head_ms, part.sampling_ms)
                table.add_row(str(part.context), str(part.tokens), *map(_number, (*spent, part.python_ms)))
        console.print(table)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
