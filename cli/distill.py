"""`treeline distill`: makes a draft head for a target, from nothing but the target."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from treeline.config import ModelConfig
from treeline.errors import ConfigError


def distill(
    out: Annotated[Path, typer.Option(help="Folder for texts, checkpoint and head; an interrupted run goes on there.")],
    target: Annotated[
        str, typer.Option(help="The target: 'default', a Hugging Face id, a folder or a .gguf file.")
    ] = "default",
    texts: Annotated[int, typer.Option(min=50, help="Texts that the target writes to learn from.")] = 4000,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines of {"id", "category", "turns"}: first turns to answer as well.')
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=64, help="Longest text, template included.")] = 320,
    slots: Annotated[int, typer.Option(min=1, help="Texts written at a time; a GPU likes more.")] = 96,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts.")] = 8,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Tokens of a training step; a GPU likes more.")] = 2048,
    draft_vocab: Annotated[int, typer.Option(min=16, help="Tokens that the head can propose.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="One seed, one result.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")] = 0,
) -> None:
    """Make a draft head for a target.

    The target makes up users' turns and answers them; the head learns the target's own distribution over what it wrote.
    Kill it at any time: the same command goes on where it was.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device '{device}': auto, cpu or cuda")
    from bench.common import load_prompts
    from distill.pipeline import Recipe, default_feature_layers, train_head, write_texts
    from distill.trainer import Progress as Trained
    from distill.trainer import TrainingPlan
    from lm.model import LanguageModel

    turns = [prompt.text for prompt in load_prompts(prompts)] if prompts else []
    config = ModelConfig.model_validate({"model": target, "device": device, "threads": threads or os.cpu_count()})
    model = LanguageModel.load(config)
    training = TrainingPlan(epochs=epochs, batch_tokens=batch_tokens, seed=seed)
    recipe = Recipe(default_feature_layers(model), texts, max_tokens, slots, draft_vocab, training)
    with Bar("texts", texts) as bar:
        write_texts(model, recipe, turns, out, lambda count, tokens: bar.show(count, tokens))
    del model  # training needs its memory
    with Bar("tokens", 1) as bar:

        def show(trained: Trained) -> None:
            note = f"loss {trained.loss:.2f}" + (f", held-out {trained.held_out}" if trained.held_out else "")
            bar.show(trained.tokens, trained.tokens, trained.total_tokens, note)

        held_out = train_head(config, recipe, out, show)
    typer.echo(f"held-out texts, by draft depth: {held_out}")
    typer.echo(f"the head is in {out}: set drafter.kind to head+ngram and drafter.head to this folder")


class Bar:
    """A progress bar with tokens per second and time left, on standard error."""

    def __init__(self, unit: str, total: int) -> None:
        columns = (
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.description}"),
            BarColumn(20),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        from rich.console import Console

        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(unit, total=total, rate=0.0, note="")
        self._first: tuple[float, int] | None = None

    def show(self, completed: int, tokens: int, total: int | None = None, note: str = "") -> None:
        """`tokens` gives the rate, from the first call on."""
        now_s = time.monotonic()
        started_s, first_tokens = self._first = self._first or (now_s, tokens)
        rate = (tokens - first_tokens) / max(1e-3, now_s - started_s)
        self._progress.update(self._task, completed=completed, total=total, rate=rate, note=note)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
