"""`treeline bench step`: what a verification pass costs, and how near that is to what the machine allows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfigFile, JsonFile
from treeline.config import Config
from treeline.config_file import load_config
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.step.measure import StepResult, Subject


def step(
    config: ConfigFile = None,
    drafter: Annotated[
        str | None, typer.Option(help="Measure this draft model's passes too; the configuration's drafter by default.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Measure a model of this shape with random weights instead: llama-8b, qwen3-8b."),
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(help="With --shape: write its profile here, for `treeline simulate --curves`.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four points of the grid only.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each system at each point.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Time passes over 1 to 64 tokens of 1 to 16 sequences, ours and transformers' in turns, and the machine's limit.

    Takes a few minutes for the default model on two cores.
    """
    loaded = load_config(config)
    if curves is not None and shape is None:
        raise ConfigError("--curves goes with --shape; `treeline profile --json` prints those of a configured target")

    from bench.common import write_report
    from bench.step.measure import QUICK, grid, run_step
    from cli.terminal import Counted

    points = list(QUICK) if quick else grid()
    with Counted("loading") as bar:
        subjects = _subjects(loaded, drafter) if shape is None else [_shaped(loaded, shape, curves)]
        bar.expect(1 + len(points) * len(subjects))
        result = run_step(subjects, points, repeats, bar.begin)
    _show(result)
    described = {"config": loaded.model_dump(mode="json"), "repeats": repeats, "shape": shape}
    write_report(json_file, described, result.rows, limit=result.limit_json())


def _subjects(config: Config, drafter: str | None) -> list[Subject]:
    """The target, and the drafter of the configuration or this draft model."""
    from bench.step.measure import head_subject, model_subject
    from drafter_svc.drafter import find_head
    from lm.draft_head import DraftHead

    target = config.verifier.target
    subjects = [model_subject("target", target)]
    if drafter is not None:
        subjects.append(model_subject("drafter", target.model_copy(update={"model": drafter, "name": None})))
    elif config.drafter.model is not None:
        subjects.append(model_subject("drafter", config.drafter.model))
    elif (folder := find_head(config.drafter, target)) is not None:
        subjects.append(head_subject(DraftHead.load(folder, target), subjects[0].max_context_tokens))
    return subjects


def _shaped(config: Config, shape: str, curves: Path | None) -> Subject:
    """A model of random weights; its profile is written first, if asked for."""
    from bench.step.shapes import random_model, shape_subject

    model = random_model(shape, config.verifier.target)
    if curves is not None:
        from verifier_svc.service.profile import profile_verification

        cache = model.new_cache(config.verifier.kv_cache_tokens, config.verifier.kv_block_tokens)
        model.capture(cache)
        measured = [asdict(curve) for curve in profile_verification(model, cache)]
        curves.write_text(json.dumps(measured) + "\n")
    return shape_subject(model)


def _show(result: StepResult) -> None:
    from cli.terminal import number, show_table

    limit = result.limit
    typer.echo(f"this machine reads {limit.read_gb_s:.1f} GB/s and multiplies {limit.gemm_gflop_s:.0f} GFLOP/s")
    headings = ("context", "sequences", "tokens", "limit", "ours", "transformers", "ours /\ntheirs", "a grammar\nadds")
    for model in dict.fromkeys(row["model"] for row in result.rows):
        rows = []
        for row in result.rows:
            if row["model"] == model:
                ratio = None if row["transformers_ms"] is None else row["ours_ms"] / row["transformers_ms"]
                times = (number(row[name]) for name in ("limit_ms", "ours_ms", "transformers_ms"))
                cells = [*(str(row[name]) for name in ("context", "sequences", "tokens")), *times, number(ratio, 2)]
                rows.append([*cells, number(row["grammar_ms"], 2)])
        show_table(f"{model}: milliseconds of a pass", headings, rows, names=0)
