"""`treeline models`: the model cache."""

from __future__ import annotations

from typing import Annotated

import typer

models = typer.Typer()


@models.callback(invoke_without_command=True)
def list_if_alone(context: typer.Context) -> None:
    """List the model cache, or fetch a model into it."""
    if context.invoked_subcommand is None:
        list_models()


@models.command("list")
def list_models() -> None:
    """Show the prepared models and where they are."""
    from lm.store import cache_folder, cached_models

    folders = cached_models()
    for folder in folders:
        size_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        typer.echo(f"{folder.name:<40} {size_bytes / 1e6:>8.0f} MB  {folder}")
    if not folders:
        typer.echo(f"no models in {cache_folder()}; `treeline models pull default` fetches one")


@models.command()
def pull(
    spec: Annotated[str, typer.Argument(help='"default", a .gguf file, a folder, or a Hugging Face id.')] = "default",
) -> None:
    """Fetch and prepare a model, and print its folder."""
    from lm.store import resolve_model

    typer.echo(resolve_model(spec))
