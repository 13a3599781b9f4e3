"""What every benchmark needs: prompts, and a report that says where it was made."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm.device import processor_name
from treeline.errors import ConfigError

OWN_PROMPTS = Path(__file__).parent / "prompts.jsonl"
VERSIONS_OF = ("treeline-serve", "torch", "transformers", "ray", "grpcio")


@dataclass(frozen=True)
class Prompt:
    id: str
    category: str
    text: str


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The first turns in a JSON-lines file of {"id", "category", "turns"}.

    Raises:
        ConfigError: the file cannot be read, or a line is something else.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()][:limit]
        rows = [json.loads(line) for line in lines]
        return [Prompt(str(row["id"]), row["category"], row["turns"][0]) for row in rows]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f'{path}: every line must be {{"id", "category", "turns": [...]}} ({error})') from None


def write_report(path: Path, config: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a benchmark's JSON: machine, versions, config, rows, and what else it found."""
    report = {"machine": machine(), "versions": versions(), "config": config, "rows": rows, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    return {"processor": processor_name(), "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONS_OF}
