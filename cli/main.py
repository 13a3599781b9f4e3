"""The `treeline` command. Each command lives in a file of its own and imports what is heavy only when it runs."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli.bench.eval_drafter import eval_drafter
from cli.bench.main import bench
from cli.bench.simulate import simulate
from cli.config import config
from cli.demo import demo
from cli.distill import distill
from cli.doctor import doctor
from cli.generate import chat, generate
from cli.models import models
from cli.profile import profile
from cli.serve import serve
from cli.top import top
from treeline import __version__
from treeline.config import SPIN_COUNT
from treeline.errors import ConfigError, TreelineError


class ErrorGroup(TyperGroup):
    """Shows expected errors as one line: exit 2 for what the operator must change, 1 for a failed call."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except TreelineError as error:
            typer.echo(f"treeline: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(
    name="treeline",
    cls=ErrorGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.add_typer(models, name="models")
app.command()(profile)
app.command()(top)
app.command()(doctor)
app.command()(config)
app.command()(demo)
app.command()(distill)
app.command()(eval_drafter)
app.command()(simulate)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def treeline(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serves large language models with speculative trees that know when to stop growing."""


def main() -> None:
    # Read when torch is loaded. Benches run models in this process, as replicas do in theirs.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    app()
