"""The plot of `treeline bench step`: milliseconds of a pass over its tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from bench.step import Row


def plot_step(rows: list[Row], path: Path) -> None:
    """One panel for each model and context: ours, transformers' and the limit, a colour for each number of sequences.

    Raises:
        OSError, ValueError: the file cannot be written, or its ending names no picture format.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.model, row.context) for row in rows}, key=lambda panel: (panel[0] != "target", panel))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False)
    for axes, (model, context) in zip(grid[0], panels, strict=True):
        _panel(axes, [row for row in rows if (row.model, row.context) == (model, context)])
        axes.set_title(f"{model}, context {context}")
    grid[0][0].set_ylabel("milliseconds of a pass")
    grid[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(axes: Axes, rows: list[Row]) -> None:
    for index, sequences in enumerate(sorted({row.sequences for row in rows})):
        line = [row for row in rows if row.sequences == sequences]
        tokens, colour = [row.tokens for row in line], f"C{index}"
        label = f"{sequences} sequence{'s' if sequences > 1 else ''}"
        axes.plot(tokens, [row.ours_ms for row in line], "o-", color=colour, label=f"ours, {label}")
        for style, name, values in (
            ("x--", "transformers", [row.transformers_ms for row in line]),
            (":", "limit", [row.limit_ms for row in line]),
        ):
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                axes.plot(tokens, known, style, color=colour, label=name if index == 0 else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.grid(visible=True, alpha=0.3)
