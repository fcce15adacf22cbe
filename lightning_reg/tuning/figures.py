"""The figures of comparisons, paths, and searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lightning_reg.tuning.results import Report

__all__ = ["draw_differences"]

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
