"""`treeline bench sweep`: every policy at every load, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.options import ConfigFile, TlsCa, Token
from treeline.config import load_config
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from bench.common import Prompt
    from bench.sweep import Result, Settings, Swept

POLICIES = "off chain:2 chain:4 eagle2:2,2,4 eagle2:4,4,12 eagle2:6,10,60 smart-paper smart"
INTERRUPTED = 130

Number = TypeVar("Number", int, float)


def sweep(
    policies: Annotated[str, typer.Option(help="Separated by spaces; 'off' is always among them.")] = POLICIES,
    concurrency: Annotated[str, typer.Option(help="Streams of the closed loops.")] = "1 2 4 8 16 32",
    rates: Annotated[
        str,
        typer.Option(help="Poisson arrivals of the open loops, as shares of plain decoding's capacity; '' for none."),
    ] = "0.5 0.9",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of {id, category, turns}; own prompts by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each policy at each load, behind a warm-up.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the order of prompts, and of the arrivals.")] = 0,
    config: ConfigFile = None,
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service, instead of an engine in this process.")
    ] = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots into this folder.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write every step's outcomes here, as JSON lines.")] = None,
) -> None:
    """Measure policies over load, closed loop and open loop, in interleaved blocks, and compare their texts.

    Ctrl-C stops and writes what has been measured so far.
    """
    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.plots import plot_sweep, require_matplotlib
    from bench.sweep import Settings, checked_policies
    from bench.sweep_report import report
    from bench.sweep_tables import markdown

    settings = Settings(
        policies=checked_policies(policies.split()),
        concurrency=_numbers("concurrency", concurrency, int),
        rates=_numbers("rates", rates, float),
        rounds=rounds,
        max_tokens=max_tokens,
        seed=seed,
    )
    if not settings.concurrency:
        raise ConfigError("--concurrency: give at least one number of streams")
    if target and (trace or config):
        raise ConfigError("--trace and --config describe an engine in this process: leave out --target")
    if plots is not None:
        require_matplotlib()
    loaded = load_prompts(prompts or OWN_PROMPTS, limit)
    results, complete = _run(settings, loaded, lambda: _system(target, token, tls_ca, config, loaded, settings), trace)
    if not results:
        raise typer.Exit(INTERRUPTED)
    found = report(results)
    tables = markdown(found)
    typer.echo(tables)
    if markdown_file is not None:
        markdown_file.write_text(tables)
    if json_file is not None:
        told = {**vars(settings), "prompts": len(loaded), "complete": complete}
        told |= {"target": target} if target else {"treeline": load_config(config).model_dump(mode="json")}
        rows = found.pop("rows")
        write_report(json_file, told, rows, **found)
    if plots is not None:
        plot_sweep(plots, results)
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _system(
    target: str | None,
    token: str | None,
    tls_ca: Path | None,
    config: Path | None,
    prompts: list[Prompt],
    settings: Settings,
) -> Swept:
    from bench.systems import RemoteSystem, start_local
    from treeline.client import TreelineClient

    streams = max(settings.concurrency)
    if target is not None:
        return RemoteSystem(TreelineClient(target, token, tls_ca), streams)
    return start_local(load_config(config), prompts, streams, settings.max_tokens)


def _run(
    settings: Settings, prompts: list[Prompt], start: Callable[[], Swept], trace: Path | None
) -> tuple[list[Result], bool]:
    """All results until the end or Ctrl-C, and whether it was the end."""
    from bench.sweep import closed_blocks, open_blocks, run_sweep
    from bench.trace import write_trace

    results: list[Result] = []
    blocks = [*closed_blocks(settings), *open_blocks(settings)]
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_progress())
        task = progress.add_task("loading and profiling", total=len(blocks))
        file = stack.enter_context(trace.open("w")) if trace else None
        try:
            system = start()
            turns = run_sweep(system, prompts, settings)
            for block in blocks:
                kind = "warm-up" if not block.round else f"round {block.round}"
                progress.update(task, description=f"{block.loop} {block.load:g}, {kind}, {block.policy}")
                result = next(turns)
                progress.advance(task)
                if result is not None:
                    results.append(result)
                    if file is not None:
                        write_trace(file, result)
        except KeyboardInterrupt:
            return results, False
    return results, True


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Blocks differ in length: the time left goes by all of them so far.
    return Progress(*columns, console=Console(stderr=True), speed_estimate_period=86400)


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Positive numbers separated by commas or spaces, in order, without repeats."""
    try:
        numbers = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--{name} '{text}': numbers separated by spaces") from None
    if any(number <= 0 for number in numbers):
        raise ConfigError(f"--{name} '{text}': numbers above 0")
    return tuple(dict.fromkeys(numbers))
