"""A sweep's report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    ("tokens_per_s", "tokens/s", 1),
    ("accepted_length", "accepted length", 2),
    ("tree_nodes", "tree nodes", 1),
    ("ttft_ms_p50", "TTFT p50, ms", 0),
    ("itl_ms_p50", "ITL p50, ms", 0),
    ("itl_ms_p95", "ITL p95, ms", 0),
)


def markdown(report: dict[str, Any]) -> str:
    """All tables, each under a heading."""
    parts = [
        "## Tokens per second, by concurrency\n\n" + _pivot(report["rows"]),
        "## Closed loop\n\n" + _rows(report["rows"], "concurrency"),
        "## Open loop\n\nRate is relative to the capacity of plain decoding.\n\n" + _rows(report["open_loop"], "rate"),
        "## Ratios of tokens per second\n\n" + _ratios(report["summary"]),
        "## Outputs\n\n" + _outputs(report),
    ]
    return "\n\n".join(parts) + "\n"


def _pivot(rows: Sequence[Row]) -> str:
    loads = list(dict.fromkeys(row["concurrency"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    cells = {(row["policy"], row["concurrency"]): f"{row['tokens_per_s']:.1f}" for row in rows}
    lines = [[policy, *(cells.get((policy, load), "") for load in loads)] for policy in policies]
    return _table(["policy", *(f"{load:g}" for load in loads)], lines)


def _rows(rows: Sequence[Row], load_name: str) -> str:
    if not rows:
        return "Not measured."
    headings = [load_name, *(["requests/s"] if load_name == "rate" else []), "policy", *(c[1] for c in COLUMNS)]
    lines = []
    for row in rows:
        load = [f"{row[load_name]:g}", *([f"{row['requests_per_s']:.2f}"] if load_name == "rate" else [])]
        policy = f"{row['policy']} ({row['setting']})" if "setting" in row else row["policy"]
        lines.append([*load, policy, *(_with_extremes(row, name, digits) for name, _, digits in COLUMNS)])
    return _table(headings, lines)


def _ratios(summary: Row) -> str:
    names = [name for name in (summary["ratios"] or [{}])[0] if "/" in name and not name.endswith(("_min", "_max"))]
    lines = [[f"{row['concurrency']:g}", *(_with_extremes(row, n, 2) for n in names)] for row in summary["ratios"]]
    table = _table(["concurrency", *names], lines)
    mean = summary["against_best_eagle2"]
    if mean is None:
        return table
    loads = ", ".join(f"{load:g}" for load in mean["concurrency"])
    return (
        f"{table}\n\nGeometric mean over concurrency {loads}: smart is {mean['geometric_mean']:.3f} x "
        f"{mean['setting']}, the best single EAGLE-2 setting."
    )


def _outputs(report: Row) -> str:
    compared, differences = report["compared_outputs"], report["different_outputs"]
    if not differences:
        return f"All {compared} answers of other policies are those of `off`."
    lines = [[d["policy"], f"{d['loop']} {d['load']:g}", d["prompt"], str(d["position"])] for d in differences]
    told = f"{len(differences)} of {compared} answers differ from those of `off`, first at the token given:"
    return told + "\n\n" + _table(["policy", "load", "prompt", "position"], lines)


def _with_extremes(row: Row, name: str, digits: int) -> str:
    if row[name] is None:
        return "-"
    value, low, high = row[name], row[f"{name}_min"], row[f"{name}_max"]
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    written = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in written)
