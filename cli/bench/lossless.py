"""`treeline bench lossless`: is the text exactly the target's own?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.options import JsonFile, Prompts
from treeline.config import DrafterConfig, ModelConfig
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from bench.common import Prompt, Row

DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"float32": "float32", "bfloat16": "bfloat16"}


def lossless(
    prompts: Prompts = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 64,
    target: Annotated[
        str, typer.Option(help="The target: 'default', a Hugging Face id, a folder or a .gguf file.")
    ] = "default",
    dtype: Annotated[str, typer.Option(help="float32 is exact; bfloat16 shows the near ties.")] = "float32",
    draft_layers: Annotated[int, typer.Option(min=1, help="Layers of the draft model cut from the target.")] = 6,
    json_file: JsonFile = None,
) -> None:
    """Compare greedy answers with transformers' own, for every policy and drafter, alone and in mixed batches of 8.

    Exits with 1 if a float32 answer differs.
    """
    from bench.common import load_prompts, write_report

    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}': float32 or bfloat16")
    loaded = load_prompts(prompts, limit)
    model = ModelConfig(model=target, dtype=DTYPES[dtype], arithmetic="float32")  # as transformers computes
    rows = _compare(model, draft_layers, loaded, max_tokens)
    _show(f"{target}, {dtype}: identical to transformers' generate", rows)
    config = {"target": target, "dtype": dtype, "max_tokens": max_tokens, "draft_layers": draft_layers}
    write_report(json_file, config, rows)
    if dtype == "float32" and any(row["identical"] < row["prompts"] for row in rows):
        raise typer.Exit(1)


def _compare(target: ModelConfig, draft_layers: int, prompts: list[Prompt], max_tokens: int) -> list[Row]:
    """With every kind of drafter that there is for this target, and a draft model cut from it."""
    from bench.lossless import run_lossless, truncated_drafter
    from cli.terminal import Counted
    from drafter_svc.drafter import find_head

    with tempfile.TemporaryDirectory() as folder, Counted("starting") as bar:
        cut = truncated_drafter(target.model, draft_layers, Path(folder))
        draft = ModelConfig(model=str(cut), dtype=target.dtype)
        drafters = {
            "ngram": DrafterConfig(kind="ngram"),
            "model": DrafterConfig(kind="model", model=draft),
            "model+ngram": DrafterConfig(kind="model+ngram", model=draft),
        }
        if find_head(DrafterConfig(), target) is not None:
            drafters["head+ngram"] = DrafterConfig(kind="head+ngram")
        return run_lossless(target, drafters, prompts, max_tokens, on_progress=bar.begin)


def _show(title: str, rows: list[Row]) -> None:
    from cli.terminal import show_table

    headings = ("drafter", "policy", "batch", "identical", "tokens", "accepted nodes", "largest logit gap")
    lines = [
        [
            row["drafter"],
            row["policy"],
            str(row["batch"]),
            f"{row['identical']} of {row['prompts']}",
            str(row["tokens"]),
            str(row["accepted_nodes"]),
            f"{row['largest_logit_gap']:.3f}",
        ]
        for row in rows
    ]
    show_table(title, headings, lines, names=2)
