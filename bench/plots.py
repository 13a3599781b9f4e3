"""Plots of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.sweep import OFF, Result
from bench.sweep_report import SMART, predictions, speedups, tree_sizes
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (9, 5)
COLOURS = [f"C{i}" for i in range(10)] + ["gold", "navy", "lime", "teal", "salmon", "indigo"]
MOST_DOTS = 2000
"""Steps drawn of each policy."""


def require_matplotlib() -> None:
    """
    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")


def plot_sweep(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write the plots of a sweep as PNG; the one of step times only where they are known."""
    closed = [result for result in results if result.block.loop == "closed"]
    policies = list(dict.fromkeys(result.block.policy for result in results))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        _plot(folder / "speedup.png", lambda axes: _draw_speedup(axes, closed, policies)),
        _plot(folder / "tree-size.png", lambda axes: _draw_tree_size(axes, closed, policies)),
    ]
    if any(len(predictions(results, policy)) for policy in policies):
        paths.append(_plot(folder / "step-time.png", lambda axes: _draw_step_time(axes, results, policies)))
    return paths


def _plot(path: Path, draw: Callable[[Axes], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=150)
    return path


def _draw_speedup(axes: Axes, closed: Sequence[Result], policies: Sequence[str]) -> None:
    axes.axhline(1, color="black", linewidth=1, label=OFF)
    for policy in policies:
        if policy != OFF:
            _band(axes, speedups(closed, policy), policy, policies)
    axes.set_title("Speed-up over plain decoding: median and range of the rounds")
    axes.set_ylabel("tokens per second / those of off")


def _draw_tree_size(axes: Axes, closed: Sequence[Result], policies: Sequence[str]) -> None:
    for policy in policies:
        if policy != OFF:
            _band(axes, tree_sizes(closed, policy), policy, policies)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_title("Tree size under load")
    axes.set_ylabel("draft nodes verified per step and request")


def _draw_step_time(axes: Axes, results: Sequence[Result], policies: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for policy in policies:
        pairs = 1000 * predictions(results, policy)
        shown = pairs[:: max(1, len(pairs) // MOST_DOTS)]
        axes.scatter(shown[:, 1], shown[:, 0], s=4, alpha=0.4, label=policy, color=_colour(policy, policies))
    axes.axline((1, 1), (10, 10), color="black", linewidth=1)
    axes.set_title("Step time: what the plan in force predicted, and what was measured")
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted, ms")


def _band(axes: Axes, by_load: dict[float, list[float]], policy: str, policies: Sequence[str]) -> None:
    known = {load: values for load, values in by_load.items() if values}
    loads, spreads = list(known), list(known.values())
    middle = [float(np.median(values)) for values in spreads]
    colour, width = _colour(policy, policies), 3 if policy == SMART else 1.5
    axes.plot(loads, middle, marker="o", linewidth=width, label=policy, color=colour)
    axes.fill_between(loads, list(map(min, spreads)), list(map(max, spreads)), color=colour, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.set_xlabel("concurrent streams")


def _colour(policy: str, policies: Sequence[str]) -> str:
    """The same in every plot."""
    if policy == OFF:
        return "black"
    others = [name for name in policies if name != OFF]
    return COLOURS[others.index(policy) % len(COLOURS)]
