"""`treeline eval-drafter`: how good a drafter is for its target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import ConfigFile, JsonFile, Limit, Prompts
from treeline.config import Config, DrafterConfig
from treeline.config_file import load_config

if TYPE_CHECKING:
    from bench.common import Prompt
    from bench.drafter.report import Evaluation


def eval_drafter(
    config_file: ConfigFile = None,
    head: Annotated[
        Path | None, typer.Option(help="Try the draft head in this folder, alone and merged with n-grams.")
    ] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 96,
    json_file: JsonFile = None,
) -> None:
    """Measure a drafter on the target's own greedy answers.

    Acceptance by depth, reliability of its probabilities, accepted lengths of a chain of 5 and a tree of 16
    nodes, the cost of its passes, and the speed-up that follows. A merged drafter is tried in its parts as well.
    """
    from bench.common import load_prompts, write_report

    config = load_config(config_file)
    config = config.model_copy(update={"drafter": _drafter(config, head)})
    loaded = load_prompts(prompts, limit)
    found = _evaluate(config, loaded, max_tokens)
    kind = config.drafter.kind
    _show(found, len(loaded))
    used = {"target": found.target, "drafter": kind, "prompts": len(loaded), "max_tokens": max_tokens}
    rows = [{"drafter": name, **summary} for name, summary in found.summaries.items()]
    own = {**found.summaries[kind], "draft_pass_ratio": found.pass_ratio, "by_category": found.by_category[kind]}
    parts = {"by_drafter_and_category": found.by_category, "costs_s": found.costs_s}
    write_report(json_file, used, rows, **own, **parts)


def _drafter(config: Config, head: Path | None) -> DrafterConfig:
    """What to try, "auto" resolved."""
    from drafter_svc.drafter import find_head

    drafter = config.drafter
    if head is not None:
        return drafter.model_copy(update={"kind": "head+ngram", "head": head})
    if drafter.kind != "auto":
        return drafter
    kind = "ngram" if find_head(drafter, config.verifier.target) is None else "head+ngram"
    return drafter.model_copy(update={"kind": kind})


def _evaluate(config: Config, prompts: list[Prompt], max_tokens: int) -> Evaluation:
    from bench.drafter.report import evaluation
    from bench.drafter.trial import AnswerWriter, DrafterTrial
    from cli.terminal import Counted
    from drafter_svc.drafter import build_drafter
    from lm.model import LanguageModel
    from lm.store import vocabulary_sha256

    drafter, target = config.drafter, config.verifier.target

    def trial(kind: str) -> DrafterTrial:
        one = drafter.model_copy(update={"kind": kind})
        return DrafterTrial(build_drafter(one, target, config.limits, sha256), one.looks_up)

    with Counted("loading") as bar:
        bar.expect(len(prompts))
        model = LanguageModel.load(target)
        sha256 = vocabulary_sha256(model.tokenizer)
        parts = drafter.kind.split("+")
        trials = {kind: trial(kind) for kind in dict.fromkeys((drafter.kind, *parts))}
        features = trials[drafter.kind].drafter.features
        writer = AnswerWriter(model, features.layers if features else None, max_tokens)
        for prompt in prompts:
            bar.begin(f"answer to {prompt.id}")
            answer = writer.answer(prompt)
            for one in trials.values():
                one.run(answer)
        bar.begin("costs of passes")
        return evaluation(model, trials, drafter.kind)


def _show(found: Evaluation, prompts: int) -> None:
    from cli.terminal import show_table

    headings = ("drafter", "top-1", "top-4", "chain:5", "tree:16", "speed-up", "ECE")
    lines = [[kind, *_cells(summary)] for kind, summary in found.summaries.items()]
    show_table(f"drafters for {found.target}, {prompts} prompts", headings, lines)
    typer.echo(f"a draft pass over 8 nodes takes {100 * found.pass_ratio:.1f} % of a target pass over 1 token")
    categories = next(iter(found.by_category.values()))
    lines = [
        [category, *(f"{rows[category]['accepted_length']['tree:16']:.2f}" for rows in found.by_category.values())]
        for category in categories
    ]
    title = "accepted length of a tree of 16 nodes, by category"
    show_table(title, ("category", *found.by_category), lines)


def _cells(summary: dict[str, Any]) -> list[str]:
    lengths, speedup = summary["accepted_length"], summary["predicted_speedup"]
    return [
        f"{summary['top1']:.3f}",
        f"{summary['top4']:.3f}",
        f"{lengths['chain:5']:.2f}",
        f"{lengths['tree:16']:.2f}",
        f"{max(speedup.values()):.2f}",
        f"{summary['ece']:.3f}",
    ]
