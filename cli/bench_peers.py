"""`treeline bench peers`: the same prompts through us and through others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile
from treeline.config import load_config

if TYPE_CHECKING:
    from rich.console import Console

    from bench.peers import Missing, PeerRow


def peers(
    config: ConfigFile = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of {id, category, turns}; own prompts by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often every system answers all prompts, in turns.")] = 3,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at a time; may be given repeatedly.  [default: 1, 8]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Compare greedy decoding end to end with transformers, OpenVINO GenAI and llama.cpp; names whoever is missing.

    OpenVINO GenAI and llama.cpp are optional: pip install "treeline[peers]".
    """
    loaded, concurrencies = load_config(config), sorted(set(concurrency or (1, 8)))

    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.local_engine import encode
    from bench.peers import run_peers
    from bench.peers_lineup import build_lineup
    from lm.model import LanguageModel
    from treeline.errors import ConfigError
    from verifier_svc.profile_cache import verification_profile

    texts = load_prompts(prompts or OWN_PROMPTS, limit)
    console = Console()
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        model = LanguageModel.load(loaded.verifier.target)
        encoded = [encode(model.tokenizer, prompt) for prompt in texts]
        room = min(model.max_context_tokens, loaded.limits.max_context_tokens) - max_tokens
        if any(len(prompt) > room for prompt in encoded):
            raise ConfigError(f"a prompt and its {max_tokens} new tokens exceed the context of {room + max_tokens}")
        cache = model.new_cache(loaded.verifier.kv_cache_tokens, loaded.verifier.kv_block_tokens)
        curves = verification_profile(model, cache)
        del cache
        lineup = build_lineup(model, loaded, curves, max_tokens, concurrencies)
        runs = sum(1 if peer.serial else len(concurrencies) for peer in lineup.peers)
        bar.update(task, total=1 + rounds * runs, description="warming up")
        rows = run_peers(
            lineup,
            encoded,
            model.eos_token_ids,
            rounds,
            concurrencies,
            lambda what: bar.update(task, advance=1, description=what),
        )
    _show(console, rows, lineup.missing)
    if json_file is not None:
        described = {
            "config": loaded.model_dump(mode="json"),
            "prompts": len(encoded),
            "max_tokens": max_tokens,
            "rounds": rounds,
        }
        missing = [asdict(peer) for peer in lineup.missing]
        write_report(json_file, described, [asdict(row) for row in rows], missing=missing)


def _show(console: Console, rows: list[PeerRow], missing: list[Missing]) -> None:
    from rich.table import Table

    ours = {row.concurrency: row.tokens_per_s for row in rows if (row.system, row.mode) == ("treeline", "smart")}
    table = Table(title="greedy decoding, end to end")
    for heading in ("system", "mode", "at a time", "tokens/s", "of smart", "agreement"):
        table.add_column(heading, justify="left" if heading in ("system", "mode") else "right")
    for row in sorted(rows, key=lambda row: row.concurrency):
        ratio = row.tokens_per_s / ours[row.concurrency]
        numbers = (str(row.concurrency), f"{row.tokens_per_s:.1f}", f"{ratio:.2f}", f"{row.agreement:.0%}")
        table.add_row(row.system, row.mode, *numbers)
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        who = dict.fromkeys(f"{row.system} {row.mode}" for row in rows if row.note == note)
        console.print(f"{', '.join(who)}: {note}", highlight=False)
    for peer in missing:
        console.print(f"missing: {peer.system} {peer.mode}: {peer.reason}", markup=False, highlight=False)
