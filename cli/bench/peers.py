"""`treeline bench peers`: the same prompts through us and through others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile, JsonFile, Prompts
from treeline.config import Config
from treeline.config_file import load_config
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.common import Prompt, Row
    from bench.peers.compare import Missing


def peers(
    config: ConfigFile = None,
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often every system answers all prompts, in turns.")] = 3,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at a time; may be given repeatedly.  [default: 1, 8]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare greedy decoding end to end with transformers, OpenVINO GenAI and llama.cpp; names whoever is missing.

    OpenVINO GenAI and llama.cpp are optional: pip install openvino-genai llama-cpp-python.
    """
    loaded, concurrencies = load_config(config), sorted(set(concurrency or (1, 8)))

    from bench.common import load_prompts, write_report

    texts = load_prompts(prompts, limit)
    rows, missing = _measure(loaded, texts, max_tokens, rounds, concurrencies)
    _show(rows, missing)
    described = {"config": loaded.model_dump(mode="json"), "prompts": len(texts), "max_tokens": max_tokens}
    write_report(json_file, described | {"rounds": rounds}, rows, missing=[vars(peer) for peer in missing])


def _measure(
    config: Config, texts: list[Prompt], max_tokens: int, rounds: int, concurrencies: list[int]
) -> tuple[list[Row], list[Missing]]:
    from bench.local_engine import encode
    from bench.peers.compare import run_peers
    from bench.peers.lineup import build_lineup
    from cli.terminal import Counted
    from lm.model import LanguageModel
    from verifier_svc.service.profile_cache import verification_profile

    with Counted("loading") as bar:
        model = LanguageModel.load(config.verifier.target)
        encoded = [encode(model.tokenizer, prompt) for prompt in texts]
        most = min(model.max_context_tokens, config.limits.max_context_tokens)
        if max(map(len, encoded)) + max_tokens > most:
            raise ConfigError(f"a prompt and its {max_tokens} new tokens exceed the context of {most}")
        cache = model.new_cache(config.verifier.kv_cache_tokens, config.verifier.kv_block_tokens)
        curves = verification_profile(model, cache)
        del cache
        lineup = build_lineup(model, config, curves, max_tokens, concurrencies, bar.begin)
        runs = sum(1 if peer.serial else len(concurrencies) for peer in lineup.peers)
        bar.expect(len(lineup.peers) + len(lineup.missing) + len(lineup.peers) + rounds * runs)
        rows = run_peers(lineup, encoded, model.eos_token_ids, rounds, concurrencies, bar.begin)
    return rows, lineup.missing


def _show(rows: list[Row], missing: list[Missing]) -> None:
    from cli.terminal import number, show_table

    smart = [row for row in rows if (row["system"], row["mode"]) == ("treeline", "smart")]
    ours = {row["concurrency"]: row["tokens_per_s"] for row in smart}
    headings = ("system", "mode", "at a time", "tokens/s", "of smart", "agreement")
    lines = [
        [
            row["system"],
            row["mode"],
            str(row["concurrency"]),
            number(row["tokens_per_s"]),
            number(row["tokens_per_s"] / ours[row["concurrency"]], 2),
            format(row["agreement"], ".0%"),
        ]
        for row in sorted(rows, key=lambda row: row["concurrency"])
    ]
    show_table("greedy decoding, end to end", headings, lines, names=2)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        who = dict.fromkeys(" ".join((row["system"], row["mode"])) for row in rows if row["note"] == note)
        typer.echo(f"{', '.join(who)}: {note}")
    for peer in missing:
        typer.echo(f"missing: {peer.system} {peer.mode}: {peer.reason}")
