"""`treeline config`: what can be configured, and whether a file does it right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from treeline.config_file import load_config


def config(
    file: Annotated[Path | None, typer.Argument(help="A configuration file to check.", show_default=False)] = None,
) -> None:
    """Print the configuration in force: the defaults, or what FILE makes of them (exit 2 if it is wrong)."""
    typer.echo("\n".join(yaml_lines(load_config(file))))


def yaml_lines(section: BaseModel, indent: str = "") -> Iterator[str]:
    """A section as YAML lines, each field's description behind it."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from yaml_lines(value, indent + "  ")
        else:
            written = json.dumps(values[name], ensure_ascii=False)  # JSON is YAML
            yield f"{indent}{name}: {written}" + (f"  # {field.description}" if field.description else "")
