"""`treeline bench sweep`: every policy at every load, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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
    from bench.synthetic import Acceptance

POLICIES = (
    "off smart smart-paper eagle2:2,2,4 eagle2:4,4,12 eagle2:6,10,60 chain:3 static:2-2-1 sequoia:16,6 opt-tree:16,6 "
    "smartspec sglang-ema vllm-adaptive cast"
)
INTERRUPTED = 130


@dataclass(frozen=True)
class Files:
    """Where to write what, if anywhere."""

    json: Path | None
    markdown: Path | None


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
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
) -> None:
    """Measure policies over load, closed loop and open loop, in blocks that take turns, and compare their texts.

    Ctrl-C stops and writes what has been measured so far.
    """
    from bench.common import OWN_PROMPTS, load_prompts
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
    drafts = parse_acceptance(acceptance) if acceptance else None
    grammar = _grammar(json_schema) if json_schema else None
    if grammar and drafts:
        raise ConfigError("--json-schema: leave out --acceptance, whose true tokens are those of free answers")
    if target and (config or drafts):
        raise ConfigError("--config and --acceptance are for an engine in this process: leave out --target")
    loaded = load_prompts(prompts or OWN_PROMPTS, limit)
    files = Files(json_file, markdown_file)

    def start() -> Swept:
        if target is not None:
            client = TreelineClient(target, token, tls_ca, max_retries=0, allow_plaintext_token=plaintext_token)
            return _service(client, settings, grammar)
        return _engine(config, loaded, settings, drafts, grammar)

    results, complete = _run(settings, loaded, start)
    if results:
        described = {**asdict(settings), "prompts": len(loaded), "acceptance": acceptance, "complete": complete}
        described |= {"json_schema": grammar.json_schema} if grammar else {}
        described |= {"target": target} if target else {"treeline": load_config(config).model_dump(mode="json")}
        _write(files, described, results)
    if not complete:
        raise typer.Exit(INTERRUPTED)


def _grammar(schema: Path) -> pb.Grammar:
    try:
        return pb.Grammar(json_schema=schema.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {schema}: {error}") from None


def _service(client: TreelineClient, settings: Settings, grammar: pb.Grammar | None) -> Swept:
    from bench.systems import RemoteSystem

    return RemoteSystem(client, max(settings.concurrency), grammar)


def _engine(
    config: Path | None,
    prompts: list[Prompt],
    settings: Settings,
    drafts: Acceptance | None,
    grammar: pb.Grammar | None,
) -> Swept:
    from bench.systems import start_local

    streams = max(settings.concurrency)
    return start_local(load_config(config), prompts, streams, settings.max_tokens, drafts, grammar)


def _run(settings: Settings, prompts: list[Prompt], start: Callable[[], Swept]) -> tuple[list[Result], bool]:
    """All results until the end or Ctrl-C, and whether it was the end."""
    from bench.sweep import closed_blocks, open_blocks, run_sweep

    blocks = [*closed_blocks(settings), *open_blocks(settings)]
    done: list[BlockRun] = []
    complete = False
    with _Bar(blocks) as bar:
        try:
            for run in run_sweep(start(), prompts, settings):
                done.append(run)
                bar.show(done)
            complete = True
        except KeyboardInterrupt:
            pass
    return [run.result for run in done if run.result is not None], complete


class _Bar:
    """Which block is run. A context manager."""

    def __init__(self, blocks: list[Block]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._blocks = blocks
        self._progress = Progress(
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("loading and profiling", total=len(blocks))

    def show(self, done: list[BlockRun]) -> None:
        left = self._blocks[len(done) :]
        self._progress.update(self._task, completed=len(done), description=_described(left[0]) if left else "done")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _described(block: Block) -> str:
    kind = "warm-up" if not block.round else f"round {block.round}"
    return f"{block.loop} {block.load:g}, {kind}, {block.policy}"


def _write(files: Files, described: dict[str, Any], results: list[Result]) -> None:
    from bench.common import write_report
    from bench.sweep_report import report
    from bench.sweep_tables import markdown

    found = report(results)
    tables = markdown(found)
    typer.echo(tables)
    if files.markdown is not None:
        files.markdown.write_text(tables)
    if files.json is not None:
        rows = found.pop("rows")
        write_report(files.json, described, rows, **found)
