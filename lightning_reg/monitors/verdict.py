"""The verdict on the curves of a fit: does it underfit, fit, overfit, or diverge?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.monitors.curves import Point

Kind = Literal["under-fits", "fits", "over-fits", "diverges", "cannot tell"]
"""What a fit does."""

ENOUGH = 3
"""The minimum number of evaluated epochs for a verdict."""

_HALF = 0.5
_TENTH = 0.1
_THIRD = 3


@dataclass(frozen=True)
class Verdict:
    """What a fit does, the evidence, and what to try next.

    Args:
        kind: ``"under-fits"``, ``"fits"``, ``"over-fits"``, ``"diverges"``, or ``"cannot tell"``.
        reason: The numbers behind the verdict.
        advice: What to try next.
        since: The first epoch of overfitting, counted from 0 as in Lightning; ``None`` for any other verdict.

    Example:
        >>> print(Verdict("over-fits", "the gap grew from 0.1 to 0.6", "Stop earlier", since=7))
        over-fits since epoch 7: the gap grew from 0.1 to 0.6. Stop earlier.
    """

    kind: Kind
    reason: str
    advice: str
    since: int | None = None

    def __str__(self) -> str:
        since = "" if self.since is None else f" since epoch {self.since}"
        return f"{self.kind}{since}: {self.reason}. {self.advice}."


def judge(points: Sequence[Point], sign: float = 1.0, name: str = "OverfittingMonitor") -> Verdict:
    """Judge the curves of a fit, by the first of these rules that applies.

    The best epoch has the smallest val. What was learned is the first val minus the best one, and likewise for train. "By more
    than its margin" means that the 95% interval lies entirely on one side.

    1. **cannot tell**, if fewer than three epochs were evaluated.
    2. **diverges**, if the last train or val is not finite, or if the last train is above the first one by more than their
       margins. Also if the last train is above the smallest one, by more than their margins and half of what was learned on
       the training sample.
    3. **cannot tell**, if the gap has no interval.
    4. **over-fits since** the first epoch after the best one, if this holds in each of the last two epochs, both after the best
       one: the gap is above 0 by more than its margin, and either val is above the best val by more than the margin of their
       difference, or the interval of the gap lies above that of the best epoch.
    5. **cannot tell**, if the margin of the last gap is more than half of the largest of these: what was learned on either
       sample, and a tenth of the best val.
    6. **under-fits**, if nothing was learned, or if val still fell by a tenth or more of what was learned in the last third of
       the epochs, while the gap is less than that fall, or not above 0 by more than its margin.
    7. **fits**, otherwise.

    Args:
        points: The evaluated epochs, in order.
        sign: -1 for a metric to maximize, so that its values are reported with their original sign.
        name: The name of the monitor, for the advice.
    """
    if len(points) < ENOUGH:
        return _too_few(points)
    best = min(points, key=lambda point: point.val if math.isfinite(point.val) else math.inf)
    if (calm := _divergence(points, sign)) is not None:
        return Verdict("diverges", calm, "Try a smaller learning rate, GradientNormClipping, or NonFiniteGradientGuard")
    if math.isnan(points[-1].gap_margin):
        return Verdict("cannot tell", _NO_INTERVAL, "Choose a metric that is a mean over samples, such as the loss: metric='…'")
    after = [point for point in points if point.epoch > best.epoch]
    if len(after) > 1 and all(_overfits(point, best) for point in after[-2:]):
        return Verdict("over-fits", _change(best, points[-1], sign), _stronger(name), after[0].epoch)
    return _judge_learning(points, best, sign)


def _judge_learning(points: Sequence[Point], best: Point, sign: float) -> Verdict:
    """Judge a fit that neither diverges nor overfits."""
    first, last = points[0], points[-1]
    learned = first.val - best.val
    scale = max(learned, first.train - last.train, _TENTH * abs(best.val))
    shown = f"the gap is {_interval(last)} at epoch {last.epoch}"
    if last.gap_margin > _HALF * scale:
        return Verdict("cannot tell", f"{shown}, too uncertain for curves that differ by {_number(scale)}", _LARGER)
    if learned <= 0:
        return Verdict("under-fits", "nothing was learned on the validation sample after the first epoch", _WEAKER)
    late = points[-1 - max(len(points) // _THIRD, 1)]
    gained = late.val - last.val
    if gained >= _TENTH * learned and last.gap <= max(gained, last.gap_margin):
        return Verdict("under-fits", f"{shown}, and validation still went {_course(late, last, sign)}", _WEAKER)
    return Verdict("fits", f"{shown}, and validation was best at epoch {best.epoch} with {_number(sign * best.val)}", _KEEP)


def _too_few(points: Sequence[Point]) -> Verdict:
    count = f"{len(points)} epoch{'' if len(points) == 1 else 's'}"
    advice = "Train for more epochs, or evaluate more often (every_n_epochs, check_val_every_n_epoch)"
    return Verdict("cannot tell", f"{count} evaluated, but a verdict needs {ENOUGH}", advice)


def _divergence(points: Sequence[Point], sign: float) -> str | None:
    """Describe how a fit diverges, or return ``None`` if it does not."""
    first, last = points[0], points[-1]
    if not (math.isfinite(last.train) and math.isfinite(last.val)):
        return f"the metric is not finite at epoch {last.epoch}"
    lowest = min((point for point in points if math.isfinite(point.train)), key=lambda point: point.train)
    for start, much in ((first, 0.0), (lowest, _HALF * (first.train - lowest.train))):
        margins = sum(margin for margin in (start.train_margin, last.train_margin) if not math.isnan(margin))
        if last.train - start.train > max(margins, much):
            numbers = (
                f"{_number(sign * start.train)} at epoch {start.epoch} to {_number(sign * last.train)} at epoch {last.epoch}"
            )
            return f"the metric on the training sample went from {numbers}"
    return None


def _overfits(point: Point, best: Point) -> bool:
    """Return whether a point is worse than the best one by more than chance."""
    is_worse = point.rise > point.rise_margin
    has_grown = point.gap - point.gap_margin > best.gap + best.gap_margin
    return point.gap > point.gap_margin and (is_worse or has_grown)


def _change(best: Point, last: Point, sign: float) -> str:
    train = f"{_number(sign * best.train)} to {_number(sign * last.train)}"
    return f"train went from {train} and validation {_course(best, last, sign)}"


def _course(start: Point, end: Point, sign: float) -> str:
    numbers = f"from {_number(sign * start.val)} to {_number(sign * end.val)}"
    return f"{numbers} between epochs {start.epoch} and {end.epoch}"


def _interval(point: Point) -> str:
    low, high = point.gap - point.gap_margin, point.gap + point.gap_margin
    return f"{_number(point.gap)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    """Return a number with three digits.

    Example:
        >>> _number(0.12345), _number(1234.5), _number(0.1)
        ('0.123', '1.23e+03', '0.1')
    """
    return f"{value:.3g}"


def _stronger(name: str) -> str:
    return (
        f"Stop early or keep the best checkpoint by 'reg/{name}/val' (EarlyStopping, ModelCheckpoint), or try more data, "
        "augmentation, or regularization, such as WeightDecay, L2Penalty, or DropoutInjection"
    )


_NO_INTERVAL = "the gap has no interval, because the metric is not a mean over samples, or a sample has a single batch"
_LARGER = "Try larger samples (samples=…), or more validation data"
_WEAKER = "Try more epochs, a larger learning rate, a larger model, or less regularization"
_KEEP = "Nothing needs to change. lightning_reg.tuning can test whether other techniques gain more"
