"""`treeline eval-drafter`: how good a drafter is for its target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import ConfigFile
from treeline.config import load_config


def eval_drafter(
    config_file: ConfigFile = None,
    head: Annotated[
        Path | None, typer.Option(help="Try the draft head in this folder, alone and merged with n-grams.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of {id, category, turns}; own prompts by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 96,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of acceptance and reliability here (PNG).")] = None,
) -> None:
    """Measure a drafter on the target's own greedy answers.

    Acceptance by depth and rank, reliability of its probabilities, accepted lengths of a chain of 5 and a tree of 16
    nodes, the cost of its passes, and the speed-up that follows. A merged drafter is tried in its parts as well.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.eval_drafter import (
        AnswerWriter,
        DrafterTrial,
        Tally,
        pass_costs,
        plot_acceptance,
        predicted_speedup,
    )
    from drafter_svc.drafter import build_drafter, find_head
    from lm.model import LanguageModel
    from lm.store import vocabulary_sha256

    config = load_config(config_file)
    drafter = config.drafter
    if head is not None:
        drafter = drafter.model_copy(update={"kind": "head+ngram", "head": head})
    if drafter.kind == "auto":
        kind = "ngram" if find_head(drafter, config.verifier.target) is None else "head+ngram"
        drafter = drafter.model_copy(update={"kind": kind})
    kinds = [drafter.kind, *drafter.kind.split("+")] if "+" in drafter.kind else [drafter.kind]
    loaded = load_prompts(prompts or OWN_PROMPTS, limit)
    model = LanguageModel.load(config.verifier.target)
    sha256 = vocabulary_sha256(model.tokenizer)

    def trial(kind: str) -> DrafterTrial:
        one = drafter.model_copy(update={"kind": kind})
        return DrafterTrial(lambda plan: build_drafter(one, config.verifier.target, config.limits, plan, sha256))

    trials = {kind: trial(kind) for kind in kinds}
    features = trials[drafter.kind].drafter.features
    writer = AnswerWriter(model, features.layers if features else None, max_tokens)
    console = Console()
    for prompt in track(loaded, "answers", console=Console(stderr=True)):
        answer = writer.answer(prompt)
        for one in trials.values():
            one.run(answer)
    costs = pass_costs(model, trials[drafter.kind].drafter)
    table = Table(title=f"drafters for {model.name}, {len(loaded)} prompts")
    for heading in ("drafter", "top-1", "top-4", "chain:5", "tree:16", "speed-up", "ECE"):
        table.add_column(heading)

    def described(tally: Tally) -> dict[str, Any]:
        summary = tally.summary()
        lengths = summary["accepted_length"]
        return summary | {
            "predicted_speedup": {
                "chain:5": predicted_speedup(lengths["chain:5"], 6, 5, costs),
                "tree:16": predicted_speedup(lengths["tree:16"], 17, 6, costs),
            }
        }

    summaries = {kind: described(one.tallies[""]) for kind, one in trials.items()}
    for kind, summary in summaries.items():
        lengths, speedup = summary["accepted_length"], summary["predicted_speedup"]
        table.add_row(
            kind, f"{summary['top1']:.3f}", f"{summary['top4']:.3f}", f"{lengths['chain:5']:.2f}",
            f"{lengths['tree:16']:.2f}", f"{max(speedup.values()):.2f}", f"{summary['ece']:.3f}",
        )  # fmt: skip
    console.print(table)
    ratio = costs["draft_8"] / costs["target_1"]
    console.print(f"a draft pass over 8 nodes takes {100 * ratio:.1f} % of a target pass over 1 token")
    by_category = {
        kind: {category: described(tally) for category, tally in one.tallies.items() if category}
        for kind, one in trials.items()
    }
    _print_categories(console, by_category)
    if plot is not None:
        plot_acceptance(plot, summaries)
    if json_file is not None:
        used = {"target": model.name, "drafter": drafter.kind, "prompts": len(loaded), "max_tokens": max_tokens}
        rows = [{"drafter": kind, **summary} for kind, summary in summaries.items()]
        own = {**summaries[drafter.kind], "draft_pass_ratio": ratio, "by_category": by_category[drafter.kind]}
        parts = {"by_drafter_and_category": by_category, "costs_s": costs}
        write_report(json_file, used, rows, **own, **parts)


def _print_categories(console: Any, by_category: dict[str, dict[str, dict[str, Any]]]) -> None:
    from rich.table import Table

    table = Table(title="accepted length of a tree of 16 nodes, by category")
    table.add_column("category")
    for kind in by_category:
        table.add_column(kind)
    for category in next(iter(by_category.values())):
        lengths = [rows[category]["accepted_length"]["tree:16"] for rows in by_category.values()]
        table.add_row(category, *(f"{length:.2f}" for length in lengths))
    console.print(table)
