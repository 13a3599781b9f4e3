"""`python -m bench.report`: writes bench/REPORT.md from the JSON files in bench/results. Nothing in it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parent / "REPORT.md"


def report(folder: Path = RESULTS) -> str:
    """All results as Markdown: one table per file, one line per row, medians only."""
    parts = ["# Results\n\nMade by `python -m bench.report` from `bench/results`. Do not edit."]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        machine, versions = found["machine"], found["versions"]
        where = f"{machine['processor']}, {machine['cores']} cores; torch {versions['torch']}"
        parts.append(f"## {path.stem}\n\n{where}\n\n{_table(found['rows'])}")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if not name.endswith(("_min", "_max")) and any(row.get(name) is not None for row in rows)
    ]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    REPORT.write_text(report())
