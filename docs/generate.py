"""`make docs` writes docs/reference/ from the code. A test keeps the pages current."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from treeline.config import Config
from treeline.metrics import DrafterMetrics, FrontDoorMetrics, PlannerMetrics, VerifierMetrics

ROOT = Path(__file__).resolve().parent.parent
SERVICES = {
    "Verifier": VerifierMetrics,
    "Drafter": DrafterMetrics,
    "Planner": PlannerMetrics,
    "Front door": FrontDoorMetrics,
}


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    folder = ROOT / "docs/reference"
    return {folder / "config.md": config_page(), folder / "metrics.md": metrics_page()}


def config_page() -> str:
    lines = [
        "# Configuration",
        "",
        "Written by `docs/generate.py`. Every setting of `treeline serve --config FILE.yaml`, with its default.",
    ]
    for path, section in sections(Config, ""):
        lines += ["", f"## `{path}`" if path else "## Sections", ""]
        if path and section.__doc__ and section.__doc__ != BaseModel.__doc__:
            lines += [section.__doc__.strip(), ""]
        lines += ["| setting | default | what it is |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            lines.append(f"| `{name}` | {default(field)} | {description(field)} |")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The section itself and those below it, each with its path ("server.http")."""
    yield path, model
    for name, field in model.model_fields.items():
        for section in models_in(field.annotation):
            yield from sections(section, f"{path}.{name}".strip("."))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def default(field: FieldInfo) -> str:
    if any(models_in(field.annotation)):
        return "see below"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value if isinstance(value, str | Path) else repr(value)}`" if value not in ("", None) else "none"


def description(field: FieldInfo) -> str:
    bounds = [f"{word} {limit}" for word, limit in bounds_of(field)]
    return "; ".join([*([field.description] if field.description else []), *bounds]).replace("|", "\\|")


def bounds_of(field: FieldInfo) -> Iterator[tuple[str, float]]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for constraint in field.metadata:
        for name, word in words.items():
            if (limit := getattr(constraint, name, None)) is not None:
                yield word, limit


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "Written by `docs/generate.py`. Names carry vLLM's stems and definitions under the prefix `treeline_`. Series "
        "of a verifier have the labels `model_name` and `replica` as well.",
    ]
    for service, metrics in SERVICES.items():
        registry = CollectorRegistry()
        metrics(registry)
        lines += ["", f"## {service}", "", "| metric | kind | labels | what it is |", "|---|---|---|---|"]
        for metric in collectors(registry):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            lines.append(f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |")
    return "\n".join(lines) + "\n"


def collectors(registry: CollectorRegistry) -> list[MetricWrapperBase]:
    found = {one for one in registry._collector_to_names if isinstance(one, MetricWrapperBase)}
    return sorted(found, key=lambda one: one._name)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
