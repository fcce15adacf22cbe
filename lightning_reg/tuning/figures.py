"""The figures of comparisons, paths, and searches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence


COLORS = {"better": "#0072B2", "undecided": "#7F7F7F", "plain": "#D55E00"}  # distinct for color-blind readers too


def draw_differences(report: Any) -> Figure:
    """Draw the gain of each candidate of a `Report` over the first, with its interval and verdict."""
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
    axis.set(title=report.summary(), xlabel=f"gain in {report.metric} over {next(iter(report.runs))} (90% interval)")
    axis.legend(loc="best", frameon=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)
    return figure


def draw_path(path: Any) -> Figure:
    """Draw a `StrengthPath`: the metric against the strength with error bars, and the best and the chosen strength."""
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


def draw_choice(choice: Any) -> Figure:
    """Draw a `Choice`: the trials of the search, the gain that the best one claims, and the confirmed gain."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    sign = 1 if choice.mode == "max" else -1
    plain = next((trial.value for trial in choice.trials if trial.values["setting"] == "{}"), math.nan)
    gains = [sign * (trial.value - plain) for trial in choice.trials]
    left.plot(range(1, len(gains) + 1), gains, "o", color="#7F7F7F", markersize=4)
    left.axhline(choice.claimed, color="#D55E00", linestyle=":", label=f"claimed by the best: {choice.claimed:+.2g}")
    left.set(xlabel="trial of the search, on one split", ylabel=f"gain in {choice.metric} over plain")
    left.legend(frameon=False)
    if confirmed := choice.differences.get("chosen"):
        each = choice.pairs()
        right.plot([0.0] * len(each), each, "o", color="#7F7F7F", markersize=4)
        error = [[confirmed.mean - confirmed.low], [confirmed.high - confirmed.mean]]
        right.errorbar(
            0.2, confirmed.mean, yerr=error, fmt="o", capsize=4, color=COLORS[confirmed.verdict], label=confirmed.verdict
        )
        right.legend(frameon=False)
    right.set(xlabel=f"confirmed on {len(choice.splits)} new splits", xticks=[], xlim=(-0.3, 0.5))
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axhspan(-choice.rope, choice.rope, color="black", alpha=0.07, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(choice.summary(), fontsize=11)
    return figure


def _smallest_positive(values: Sequence[float]) -> float:
    return min((abs(value) for value in values if value), default=1.0)
