"""Many simulations side by side: run over the cores, as a table, as a plot."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.simulator.conditions import parse_conditions
from bench.simulator.load import Load
from bench.simulator.simulation import WARM_UP, Result, Scenario, simulate
from planner.policies import parse_policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OFF, SMART = "off", "smart"
ORACLE = "oracle-fixed"
FIXED = ("off", "chain", "static", "sequoia", "eagle2", "opt-tree")
SIZE_INCHES = (8, 9)


def run_all(
    scenario: Scenario, policies: Sequence[str], loads: Sequence[Load], conditions: Sequence[str]
) -> Iterator[tuple[str, Result]]:
    """(conditions, result) as they come, one per cell, in parallel over the cores; steps are shared out evenly."""
    cells = [(name, policy, load) for name in conditions for load in loads for policy in policies]
    each = replace(scenario, steps=max(1, scenario.steps // len(cells)))
    met = {name: replace(each, conditions=parse_conditions(name)) for name in conditions}
    # Spawned, not forked: a copy of this process would find locks taken by threads that it does not have.
    context = multiprocessing.get_context("spawn")
    # Looking for cycles would take 5 % of the time, and there are none.
    pool = ProcessPoolExecutor(min(len(cells), os.cpu_count() or 1), context, initializer=gc.disable)
    try:
        # From the last on: what is dear is mostly listed last, and should not run on alone in the end.
        futures = {pool.submit(simulate, met[name], policy, load): name for name, policy, load in reversed(cells)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def rows(results: Sequence[Result], loads: Sequence[Load], policies: Sequence[str]) -> list[dict[str, Any]]:
    """One row per load and policy in the order given, with the speed-up over off and the best fixed policy's row.

    All results are of the same conditions.

    A closed loop's speed-up is of its goodput; under open arrivals goodput is what arrives, and the speed-up is of the
    median time between tokens.
    """
    found = {(result.load, result.policy): result for result in results}
    made = []
    for load in loads:
        here = [found[load.spec, policy] for policy in policies if (load.spec, policy) in found]
        off = found.get((load.spec, OFF))
        made += [_row(result, off, load) for result in here]
        fixed = [result for result in here if parse_policy(result.policy).spec.partition(":")[0] in FIXED]
        if fixed:
            best = max(fixed, key=lambda result: _speed(result, load))
            made.append({**_row(best, off, load), "policy": ORACLE, "setting": best.policy})
    return made


def _speed(result: Result, load: Load) -> float:
    return result.tokens_per_s if load.closed else 1 / result.itl_s_p50


def _row(result: Result, off: Result | None, load: Load) -> dict[str, Any]:
    speedup = _speed(result, load) / _speed(off, load) if off else math.nan
    values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in asdict(result).items()}
    return {**values, "speedup": None if math.isnan(speedup) else speedup}


def markdown(made: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table. Targets: share of those requests that met their time per token."""
    targets = any(row["targets_met"] is not None for row in made)
    lines = [
        "| load | policy | tok/s | speed-up | batch | nodes | length | TTFT p50/p95 ms | per token p50/p95 ms |"
        + (" targets |" if targets else ""),
        "|---|---|---|---|---|---|---|---|---|" + ("---|" if targets else ""),
    ]
    for row in made:
        name = f"{row['policy']} ({row['setting']})" if "setting" in row else row["policy"]
        lines.append(
            f"| {row['load']} | {name} | {row['tokens_per_s']:.0f} | {_number(row['speedup'], 2)} "
            f"| {row['mean_batch']:.1f} | {row['tree_nodes']:.1f} | {row['accepted_length']:.2f} "
            f"| {_ms(row['ttft_s_p50'])} / {_ms(row['ttft_s_p95'])} "
            f"| {_ms(row['itl_s_p50'])} / {_ms(row['itl_s_p95'])} |"
            + (f" {_number(row['targets_met'], 2)} |" if targets else "")
        )
    return "\n".join(lines)


def summary(made: Sequence[dict[str, Any]]) -> str:
    """How smart compares at every load and under all conditions, as a Markdown table; empty without `smart`."""
    speedups = {(row["conditions"], row["load"], row["policy"]): row["speedup"] for row in made}
    lines = ["| conditions | load | smart / off | smart / best fixed |", "|---|---|---|---|"]
    for (conditions, load, policy), smart in speedups.items():
        best = speedups.get((conditions, load, ORACLE))
        if policy == SMART and smart is not None and best:
            lines.append(f"| {conditions} | {load} | {smart:.2f} | {smart / best:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def steps_per_s(made: Sequence[dict[str, Any]]) -> str:
    """What the simulator itself managed: steps per second of processor time by policy and load, as a Markdown table."""
    loads = list(dict.fromkeys(row["load"] for row in made))
    lines = ["| policy | " + " | ".join(loads) + " |", "|---" * (1 + len(loads)) + "|"]
    for policy in dict.fromkeys(row["policy"] for row in made if row["policy"] != ORACLE):
        speeds = []
        for load in loads:
            cells = [row for row in made if (row["policy"], row["load"]) == (policy, load)]
            # A quarter of the steps is warm-up: simulated, but not counted.
            done, cpu_s = sum(row["steps"] for row in cells) / (1 - WARM_UP), sum(row["cpu_s"] for row in cells)
            speeds.append(f"{done / cpu_s:.0f}" if cpu_s else "")
        lines.append(f"| {policy} | " + " | ".join(speeds) + " |")
    return "\n".join(lines)


def plot(
    path: Path, made: Sequence[dict[str, Any]], policies: Sequence[str], loads: Sequence[Load], title: str
) -> None:
    """Speed-up and tree size over closed-loop load."""
    from matplotlib.figure import Figure

    closed = [load.spec for load in loads if load.closed]
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    figure.suptitle(title)
    above.axhline(1, color="black", linewidth=1)
    for policy in policies:
        cells = [row for row in made if row["policy"] == policy and row["load"] in closed]
        if policy != OFF:
            _line(above, cells, "speedup", policy)
            _line(below, cells, "tree_nodes", policy)
    above.set_ylabel("goodput / that of off")
    below.set_ylabel("draft nodes verified per step and request")
    below.set_yscale("symlog", linthresh=1)
    below.set_xlabel("streams per replica")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _line(axes: Axes, cells: Sequence[dict[str, Any]], value: str, policy: str) -> None:
    streams = [float(row["load"]) for row in cells]
    axes.plot(streams, [row[value] for row in cells], marker="o", linewidth=3 if policy == SMART else 1.2, label=policy)
    axes.set_xscale("log", base=2)
    axes.set_xticks(streams, [f"{stream:g}" for stream in streams])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"
