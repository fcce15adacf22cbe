"""A figure of the curves of a fit: both samples with their 95% bands, the gap, and where overfitting begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.monitors.curves import Point
    from lightning_reg.monitors.verdict import Verdict

_COLORS = {"train": "#1f77b4", "val": "#d95f02", "gap": "#555555"}


def draw_curves(points: Sequence[Point], metric: str, verdict: Verdict, sign: float = 1.0) -> Any:
    """Draw the curves of a fit.

    Args:
        points: The evaluated epochs, in order.
        metric: The name of the metric, for the axis.
        verdict: The verdict on the curves. A mark shows where overfitting begins.
        sign: -1 for a metric to maximize.

    Returns:
        A ``matplotlib.figure.Figure`` without a window.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'lightning-reg[plots]'") from error
    figure = Figure(figsize=(7.0, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _band(above, points, "train", sign, "training sample")
    _band(above, points, "val", sign, "validation sample")
    _band(below, points, "gap", 1.0, "gap")
    below.axhline(0.0, color="black", linewidth=0.8)
    if verdict.since is not None:
        for axes in (above, below):
            axes.axvline(verdict.since, color="#b2182b", linestyle="--", linewidth=1.2)
        above.plot([], [], color="#b2182b", linestyle="--", linewidth=1.2, label="over-fits")
    above.set_title(_title(verdict), loc="left", fontsize="medium")
    above.set_ylabel(metric)
    above.legend(frameon=False)
    below.set_ylabel("gap")
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _band(axes: Any, points: Sequence[Point], what: str, sign: float, label: str) -> None:
    """Draw a curve, and its 95% interval where it is known."""
    epochs = [point.epoch for point in points]
    values = [sign * getattr(point, what) for point in points]
    margins = [getattr(point, f"{what}_margin") for point in points]
    axes.plot(epochs, values, color=_COLORS[what], marker="o", markersize=3, label=label)
    low, high = ([v + side * margin for v, margin in zip(values, margins, strict=True)] for side in (-1, 1))
    axes.fill_between(epochs, low, high, color=_COLORS[what], alpha=0.2, linewidth=0)


def _title(verdict: Verdict) -> str:
    return verdict.kind if verdict.since is None else f"{verdict.kind} since epoch {verdict.since}"
