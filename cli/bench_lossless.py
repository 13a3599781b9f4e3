"""`treeline bench lossless`: is the text exactly the target's own?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer


def lossless(
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of {id, category, turns}; own prompts by default.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use the first so many prompts.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 64,
    target: Annotated[
        str, typer.Option(help="The target: 'default', a Hugging Face id, a folder or a .gguf file.")
    ] = "default",
    dtype: Annotated[str, typer.Option(help="float32 is exact; bfloat16 shows the near ties.")] = "float32",
    draft_layers: Annotated[int, typer.Option(min=1, help="Layers of the draft model cut from the target.")] = 6,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Compare greedy answers with transformers' own, for every policy and drafter, alone and in mixed batches of 8.

    Exits with 1 if a float32 answer differs.
    """
    from rich.console import Console
    from rich.table import Table

    from bench.common import OWN_PROMPTS, load_prompts, write_report
    from bench.lossless import run_lossless, truncated_drafter
    from drafter_svc.drafter import find_head
    from treeline.config import DrafterConfig, ModelConfig
    from treeline.errors import ConfigError

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype '{dtype}': float32 or bfloat16")
    chosen: Literal["float32", "bfloat16"] = "float32" if dtype == "float32" else "bfloat16"
    loaded = load_prompts(prompts or OWN_PROMPTS, limit)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, console.status("starting") as status:
        draft = ModelConfig(model=str(truncated_drafter(target, draft_layers, Path(folder))), dtype=chosen)
        drafters = {
            "ngram": DrafterConfig(kind="ngram"),
            "model": DrafterConfig(kind="model", model=draft),
            "model+ngram": DrafterConfig(kind="model+ngram", model=draft),
        }
        target_config = ModelConfig(model=target, dtype=chosen)
        if find_head(DrafterConfig(), target_config) is not None:
            drafters["head+ngram"] = DrafterConfig(kind="head+ngram")
        results = run_lossless(target_config, drafters, loaded, max_tokens, on_progress=status.update)
    table = Table(title=f"{target}, {dtype}: identical to transformers' generate")
    for heading in ("drafter", "policy", "batch", "identical", "tokens", "accepted nodes", "largest logit gap"):
        table.add_column(heading)
    rows = [result.row() for result in results]
    for row in rows:
        table.add_row(
            row["drafter"], row["policy"], str(row["batch"]), f"{row['identical']} of {row['prompts']}",
            str(row["tokens"]), str(row["accepted_nodes"]), f"{row['largest_logit_gap']:.3f}",
        )  # fmt: skip
    console.print(table)
    if json_file is not None:
        config = {"target": target, "dtype": dtype, "max_tokens": max_tokens, "draft_layers": draft_layers}
        write_report(json_file, config, rows)
    if dtype == "float32" and any(row["identical"] < row["prompts"] for row in rows):
        raise typer.Exit(1)
