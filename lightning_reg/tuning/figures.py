"""The figures of comparisons, paths, and searches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.tuning.path import StrengthPath
    from lightning_reg.tuning.results import Report

__all__ = ["draw_differences", "draw_path"]

COLORS = {"better": "#0072B2", "undecided": "#7F7F7F", "plain": "#D55E00"}  # distinct for color-blind readers too


def draw_differences(report: Report) -> Figure:
    """Draw the gain of each candidate over the first, with its interval and what it means."""
    names = list(report.differences)
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-report.rope, report.rope, color="black", alpha=0.07, linewidth=0, label="does not matter")
    axis.axvline(0, color="black", linewidth=0.8)
    for row, name in enumerate(names):
        found = report.differences[name]
        error = [[found.mean - found.low], [found.high - found.mean]]
        axis.errorbar(found.mean, row, xerr=error, fmt="o", capsize=4, color=COLORS[found.verdict])
        axis.annotate(found.verdict, (found.high, row), (8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.margins(x=0.2)
    axis.set(title=report.summary(), xlabel=f"gain in {report.metric} over {next(iter(report.runs))} (90 % interval)")
    axis.legend(loc="best", frameon=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)
    return figure


def draw_path(path: StrengthPath) -> Figure:
    """Draw the metric over the strength with error bars, and mark the best and the chosen strength."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    logarithmic = path.values[0] > 0
    for part, label, color, style in (("training", "training", "#7F7F7F", "--"), ("value", "validation", "#D55E00", "-")):
        means, errors = zip(*path.curve(part), strict=True)
        if any(map(math.isfinite, means)):
            axis.errorbar(path.values, means, yerr=errors, fmt=f"o{style}", color=color, capsize=3, markersize=4, label=label)
    for value, label, style in ((path.best, "best", ":"), (path.choice, "within one standard error", "-")):
        axis.axvline(value, color="#0072B2", linestyle=style, label=f"{label}: {value:g}")
    for value in path.failed:
        axis.axvline(value, color="black", alpha=0.15, linewidth=6)
    axis.set_xscale(
        "log" if logarithmic else "symlog", **({} if logarithmic else {"linthresh": _smallest_positive(path.values)})
    )
    axis.set(xlabel=path.argument, ylabel=f"{path.metric} (± one standard error)", title=path.summary())
    axis.title.set_fontsize(10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _smallest_positive(values: Sequence[float]) -> float:
    return min((abs(value) for value in values if value), default=1.0)
