"""What every benchmark needs: prompts, and a report that says where it was made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from lm.device import processor_name
from treeline.errors import ConfigError

OWN_PROMPTS = Path(__file__).parent / "prompts.jsonl"
VERSIONS_OF = ("treeline-serve", "torch", "transformers", "ray", "grpcio", "openvino-genai", "llama-cpp-python")


Row = dict[str, Any]
"""A row of a report."""


@dataclass(frozen=True)
class Prompt:
    id: str
    category: str
    text: str


def load_prompts(path: Path | None, limit: int | None = None) -> list[Prompt]:
    """The first turns in a JSON-lines file of {"id", "category", "turns"}; our own prompts without one.

    Raises:
        ConfigError: the file cannot be read, or a line is something else.
    """
    path = path or OWN_PROMPTS
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()][:limit]
        rows = [json.loads(line) for line in lines]
        return [Prompt(str(row["id"]), row["category"], row["turns"][0]) for row in rows]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f'{path}: every line must be {{"id", "category", "turns": [...]}} ({error})') from None


def spread(name: str, values: Sequence[float]) -> Row:
    """The median of `values` as `name`, the extremes as `name_min` and `name_max`; None where there are no values."""
    found = (median(values), min(values), max(values)) if values else (None, None, None)
    return dict(zip((name, f"{name}_min", f"{name}_max"), found, strict=True))


def write_report(path: Path | None, config: dict[str, Any], rows: list[Row], **more: Any) -> None:
    """Write a benchmark's JSON, if it is asked for: machine, versions, config, rows, and what else it found."""
    if path is None:
        return
    report = {"machine": machine(), "versions": versions(), "config": config, "rows": rows, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    return {"processor": processor_name(), "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Of Python, and of those of VERSIONS_OF that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
