"""`make docs` writes docs/reference/ from the code. A test keeps the pages current."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
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
CONTRACTS = ["generation", "drafting", "planning"]


def pages() -> dict[Path, str]:
    """The text of every generated page."""
    folder = ROOT / "docs/reference"
    made = {"config": config_page, "metrics": metrics_page, "grpc": grpc_page}
    return {folder / f"{name}.md": page() for name, page in made.items()}


def config_page() -> str:
    lines = [
        "# Configuration",
        "",
        "Written by `docs/generate.py`. Every setting of `treeline serve --config FILE.yaml`, with its default.",
    ]
    for path, section in sections(Config, ""):
        lines += ["", f"## `{path}`" if path else "## Sections", ""]
        if path and section.__doc__ and section.__doc__ != BaseModel.__doc__:
            lines += [inspect.cleandoc(section.__doc__), ""]
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


def grpc_page() -> str:
    lines = [
        "# gRPC",
        "",
        "Written by `docs/generate.py` from `proto/treeline/v1`. Clients speak `generation.proto`, which only grows. "
        "The other contracts are between services of one version.",
    ]
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(
        [buf, "build", "--as-file-descriptor-set", "-o", "-"], cwd=ROOT, capture_output=True, check=True
    )
    files = [file for file in FileDescriptorSet.FromString(built.stdout).file if file.name.startswith("treeline/")]
    for file in sorted(files, key=lambda file: CONTRACTS.index(Path(file.name).stem)):
        lines += ["", f"## {Path(file.name).name}", *contract(file)]
    return "\n".join(lines) + "\n"


def contract(file: FileDescriptorProto) -> Iterator[str]:
    """Services, messages and enums of one file, each as a table. A path counts as in `SourceCodeInfo.Location.path`."""
    comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}

    def table(kind: int, index: int, name: str, head: str, rows: Iterable[str]) -> Iterator[str]:
        about = " ".join(comments.get((kind, index), "").split())
        yield from ["", f"### {name}", *(["", about] if about else [])]
        cells = [f"{row} | {' '.join(comments.get((kind, index, 2, at), '').split())} |" for at, row in enumerate(rows)]
        if cells:
            yield from ["", f"| {head} | what it is |", "|---" * (head.count("|") + 2) + "|", *cells]

    for index, service in enumerate(file.service):
        rows = (
            f"| `{method.name}` | {link(method.input_type, method.client_streaming)} | "
            f"{link(method.output_type, method.server_streaming)}"
            for method in service.method
        )
        yield from table(6, index, service.name, "method | takes | returns", rows)
    for index, message in enumerate(file.message_type):
        rows = (f"| `{field.name}` | {field_type(message, field)}" for field in message.field)
        yield from table(4, index, message.name, "field | type", rows)
    for index, enum in enumerate(file.enum_type):
        rows = (f"| `{value.name}`" for value in enum.value)
        yield from table(5, index, enum.name, "value", rows)


def link(type_name: str, streaming: bool = False) -> str:
    """A message's full name as a link to its heading."""
    name = type_name.rpartition(".")[2]
    return f"{'stream of ' * streaming}[{name}](#{name.lower()})"


def field_type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    for entry in message.nested_type:  # the only nested messages are those of maps
        if entry.options.map_entry and field.type_name.endswith(f".{entry.name}"):
            key, value = (field_type(entry, part) for part in entry.field)
            return f"map of {key} to {value}"
    name = link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return f"repeated {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
