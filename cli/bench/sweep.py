"""`treeline bench sweep`: every policy at every load, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import ConfigFile, JsonFile, Limit, PlaintextToken, Prompts, TlsCa, Token, numbers
from treeline.client import TreelineClient
from treeline.config_file import load_config
from treeline.errors import ConfigError
from treeline.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from bench.common import Prompt
    from bench.sweep import Block, BlockRun, Result, Settings, Swept

POLICIES = (
    "off smart smart-paper eagle2:2,2,4 eagle2:4,4,12 eagle2:6,10,60 chain:3 static:2-2-1 sequoia:16,6 opt-tree:16,6 "
    "smartspec sglang-ema vllm-adaptive cast"
)
COLUMNS = (
    ("tokens_per_s", "tokens/s", 1),
    ("accepted_length", "accepted", 2),
    ("tree_nodes", "nodes", 1),
    ("ttft_ms_p50", "TTFT p50, ms", 0),
    ("itl_ms_p50", "ITL p50, ms", 0),
    ("itl_ms_p95", "ITL p95, ms", 0),
)
INTERRUPTED = 130


def sweep(
    policies: Annotated[str, typer.Option(help="Separated by spaces; 'off' is always among them.")] = POLICIES,
    concurrency: Annotated[str, typer.Option(help="Streams of the closed loops.")] = "1 2 4 8 16 32",
    rates: Annotated[
        str,
        typer.Option(help="Poisson arrivals of the open loops, as shares of plain decoding's capacity; '' for none."),
    ] = "0.5 0.9",
    prompts: Prompts = None,
    limit: Limit = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each answer.")] = 48,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each policy at each load, behind a warm-up.")] = 3,
    block_seconds: Annotated[float, typer.Option(min=0.1, help="A block is measured for no longer.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the order of prompts, and of the arrivals.")] = 0,
    config: ConfigFile = None,
    acceptance: Annotated[
        str | None,
        typer.Option(
            help="Draft synthetically: the true token is the first, second, ... choice with these probabilities, such "
            "as 0.6,0.15,0.05; those of deeper nodes follow behind a slash."
        ),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON Schema that every answer satisfies.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="host:port of a running service, instead of an engine in this process.")
    ] = None,
    token: Token = None,
    tls_ca: TlsCa = None,
    plaintext_token: PlaintextToken = False,
    json_file: JsonFile = None,
) -> None:
    """Measure policies over load, closed loop and open loop, in blocks that take turns, and compare their texts.

    Ctrl-C stops and writes what has been measured so far.
    """
    from bench.common import load_prompts
    from bench.sweep import Settings, checked_policies
    from bench.synthetic import parse_acceptance

    settings = Settings(
        policies=checked_policies(policies.split()),
        concurrency=numbers("--concurrency", concurrency, int),
        rates=numbers("--rates", rates, float),
        rounds=rounds,
        max_tokens=max_tokens,
        block_s=block_seconds,
        seed=seed,
    )
    if not settings.concurrency:
        raise ConfigError("--concurrency: give at least one number of streams")
    if json_schema and acceptance:
        raise ConfigError("--json-schema: leave out --acceptance, whose true tokens are those of free answers")
    if target and (config or acceptance):
        raise ConfigError("--config and --acceptance are for an engine in this process: leave out --target")
    grammar = _grammar(json_schema) if json_schema else None
    loaded = load_prompts(prompts, limit)
    described = {**asdict(settings), "prompts": len(loaded), "acceptance": acceptance}
    described |= {"json_schema": grammar.json_schema} if grammar else {}
    from bench.systems import RemoteSystem, start_local  # takes seconds to import: check the input first

    streams = max(settings.concurrency)
    start: Callable[[], Swept]
    if target is None:
        served, drafts = load_config(config), parse_acceptance(acceptance) if acceptance else None
        described["treeline"] = served.model_dump(mode="json")
        start = partial(start_local, served, loaded, streams, max_tokens, drafts, grammar)
    else:
        described["target"] = target
        client = TreelineClient(target, token, tls_ca, max_retries=0, allow_plaintext_token=plaintext_token)
        start = partial(RemoteSystem, client, streams, grammar)
    results, complete = _run(settings, loaded, start)
    if results:
        _write(json_file, described | {"complete": complete}, results)
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _grammar(schema: Path) -> pb.Grammar:
    try:
        return pb.Grammar(json_schema=schema.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {schema}: {error}") from None


def _run(settings: Settings, prompts: list[Prompt], start: Callable[[], Swept]) -> tuple[list[Result], bool]:
    """All results until the end or Ctrl-C, and whether the sweep is complete."""
    from bench.sweep import closed_blocks, open_blocks, run_sweep
    from cli.terminal import Counted

    blocks = [*closed_blocks(settings), *open_blocks(settings)]
    done: list[BlockRun] = []
    with Counted("loading and profiling") as bar:
        bar.expect(len(blocks))
        try:
            runs = run_sweep(start(), prompts, settings)
            bar.begin(_described(blocks[0]))
            for run in runs:
                done.append(run)
                bar.begin(_described(blocks[len(done)]) if len(done) < len(blocks) else "done")
        except KeyboardInterrupt:
            pass
    return [run.result for run in done if run.result is not None], len(done) == len(blocks)


def _described(block: Block) -> str:
    kind = "warm-up" if not block.round else f"round {block.round}"
    return f"{block.loop} {block.load:g}, {kind}, {block.policy}"


def _write(json_file: Path | None, described: dict[str, Any], results: list[Result]) -> None:
    from bench.common import write_report
    from bench.sweep_report import report

    found = report(results)
    _show(found)
    write_report(json_file, described, found.pop("rows"), **found)


def _show(found: dict[str, Any]) -> None:
    from cli.terminal import number, show_table

    def cell(row: dict[str, Any], name: str, digits: int) -> str:
        """The median, with the extremes of several rounds."""
        low, high = row[f"{name}_min"], row[f"{name}_max"]
        return number(row[name], digits) + ("" if low == high else f" ({low:.{digits}f}-{high:.{digits}f})")

    for title, load, rows in (
        ("Closed loop, by streams", "concurrency", found["rows"]),
        ("Open loop, by arrivals over the capacity of plain decoding", "rate", found["open_loop"]),
    ):
        lines = [
            [
                f"{row[load]:g}",
                f"{row['policy']} ({row['setting']})" if "setting" in row else row["policy"],
                *(cell(row, name, digits) for name, _, digits in COLUMNS),
            ]
            for row in rows
        ]
        if lines:
            show_table(title, ["load", "policy", *(heading for _, heading, _ in COLUMNS)], lines, names=2)
    ratios = found["ratios"]
    names = [name for name in (ratios or [{}])[0] if "/" in name and not name.endswith(("_min", "_max"))]
    lines = [[f"{row['concurrency']:g}", *(cell(row, name, 2) for name in names)] for row in ratios]
    show_table("Ratios of tokens per second, round by round", ["load", *names], lines)
    for differs in found["different_outputs"]:
        typer.echo("text differs from that of off: " + ", ".join(f"{name} {value}" for name, value in differs.items()))
    typer.echo(f"{len(found['different_outputs'])} of {found['compared_outputs']} answers differ from those of off")
