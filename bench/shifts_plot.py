"""The picture of `treeline bench shifts`: tree sizes behind steps of the load, step times beside CPU hogs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.plots import require_matplotlib
from bench.shifts_report import ShiftStep, by_phase, plain, smoothed_sizes
from treeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (10, 8)
HEADROOM = 1.3
"""Times the highest tree, and the most streams, above which there is room for a legend."""
LEAST_MS_SHARE, MOST_MS_SHARE = 0.5, 4.0
"""Step times are shown from and to so many times their median: single pauses would flatten all else."""


def check_picture(path: Path) -> None:
    """
    Raises:
        ConfigError: matplotlib is not installed, or the name's ending names no picture format.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ConfigError(f"--plot {path}: the name must end in .png, .svg or .pdf")


def plot_shifts(path: Path, load: Sequence[ShiftStep], hogs: Sequence[ShiftStep]) -> None:
    """Above, tree size over time with the load; below, predicted and measured step time over time with the hogs.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    above, below = figure.subplots(2)
    _draw_sizes(above, load)
    _draw_step_times(below, [step for step in hogs if plain(step)])
    for axes in (above, below):
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_sizes(axes: Axes, steps: Sequence[ShiftStep]) -> None:
    for index, taken in enumerate(by_phase([step for step in steps if step.sequences]).values()):
        times_s, sizes = np.asarray([step.time_s for step in taken]), [step.verified for step in taken]
        axes.plot(times_s, sizes, ".", color="C0", alpha=0.3, label=None if index else "each step")
        smooth = smoothed_sizes(times_s, sizes)
        axes.plot(times_s, smooth, color="C0", linewidth=2, label=None if index else "running median")
    axes.set_ylim(0, HEADROOM * max(1.0, *(step.verified for step in steps)))
    axes.set_ylabel("nodes verified per step and request")
    axes.set_title("Tree size behind steps of the load")
    axes.legend(loc="upper left")
    streams = axes.twinx()
    all_times_s = [step.time_s for step in steps]
    streams.plot(all_times_s, [step.streams for step in steps], color="C1", drawstyle="steps-pre", label="streams")
    streams.plot(all_times_s, [step.sequences for step in steps], ":", color="C1", label="of which decode")
    streams.set_ylim(0, HEADROOM * max(step.streams for step in steps))
    streams.set_ylabel("streams")
    streams.legend(loc="upper right")


def _draw_step_times(axes: Axes, steps: Sequence[ShiftStep]) -> None:
    times_s = [step.time_s for step in steps]
    measured = [step.measured_ms for step in steps]
    axes.plot(times_s, measured, ".", color="C0", alpha=0.5, label="measured")
    axes.plot(times_s, [step.predicted_ms for step in steps], color="black", linewidth=1, label="predicted")
    for index, (phase, taken) in enumerate(by_phase(steps).items()):
        axes.axvspan(taken[0].time_s, taken[-1].time_s, color=f"C{index + 1}", alpha=0.1, label=phase)
    axes.set_ylim(LEAST_MS_SHARE * min(measured), MOST_MS_SHARE * float(np.median(measured)))
    axes.set_ylabel("step, ms")
    axes.set_title("Step time while CPU hogs come and go: what the plan in force predicted, and what was measured")
    axes.legend(loc="upper left")
