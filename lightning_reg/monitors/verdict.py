"""What the curves of a fit say: does it under-fit, fit, over-fit, or diverge?"""

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
"""The number of evaluated epochs from which on curves can be judged."""

_NOISY = 0.5  # margin of the gap, relative to what was learned
_SMALL = 0.1  # change or gap, relative to what was learned
_LATE = 3  # the last third of the epochs


@dataclass(frozen=True)
class Verdict:
    """What a fit does, why that is thought, and what to try next.

    Args:
        kind: ``"under-fits"``, ``"fits"``, ``"over-fits"``, ``"diverges"``, or ``"cannot tell"``.
        reason: The numbers behind it.
        advice: What to try next.
        since: The first epoch of over-fitting, counted from 0 as Lightning does; ``None`` for everything else.

    Example:
        >>> print(Verdict("over-fits", "the gap grew from 0.1 to 0.6", "stop earlier", since=7))
        over-fits since epoch 7: the gap grew from 0.1 to 0.6. Try: stop earlier
    """

    kind: Kind
    reason: str
    advice: str
    since: int | None = None

    def __str__(self) -> str:
        since = "" if self.since is None else f" since epoch {self.since}"
        return f"{self.kind}{since}: {self.reason}. Try: {self.advice}"


def judge(points: Sequence[Point], sign: float = 1.0) -> Verdict:
    """Judge the curves of a fit, by the first of these rules that applies.

    The best epoch is that of the smallest val. What was learned is the difference between the first val and the best one.

    1. **cannot tell**, if fewer than three epochs were evaluated.
    2. **diverges**, if the last train or val is not finite, or the last train is worse than the first one by more than both
       margins.
    3. **cannot tell**, if the gap has no interval.
    4. **over-fits since** the first epoch after the best one, if the last gap is above 0 by more than its margin, and either
       the last val is worse than the best one by more than the margin of their difference, or the interval of the last gap lies
       above that of the best epoch's gap: the training data are learned ever better, the validation data are not.
    5. **cannot tell**, if the margin of the last gap is more than half of what was learned, and more than half of what the
       training sample shows to be learned: the samples are too small.
    6. **under-fits**, if nothing was learned, or if the gap is less than a tenth of what was learned, or not above 0 by more
       than its margin, and val still improved by a tenth or more of it in the last third of the epochs.
    7. **fits**, otherwise.

    Args:
        points: The evaluated epochs, in order.
        sign: -1 for a metric to maximize, to report its values as they are.
    """
    if len(points) < ENOUGH:
        return _too_few(points)
    last, best = points[-1], min(points, key=lambda point: point.val if math.isfinite(point.val) else math.inf)
    if _diverges(points):
        return Verdict(
            "diverges",
            f"the training sample went from {_number(sign * points[0].train)} to {_number(sign * last.train)}",
            _CALM,
        )
    if math.isnan(last.gap_margin):
        return Verdict(
            "cannot tell",
            "the gap has no interval, since the metric is not a mean over samples or there are fewer than two batches",
            "a metric that is one, such as the loss: metric='…', or more samples",
        )
    since = next((point.epoch for point in points if point.epoch > best.epoch), None)
    if since is not None and _overfits(last, best):
        return Verdict(
            "over-fits",
            f"{_values(best, sign)} at epoch {best.epoch}, {_values(last, sign)} at epoch {last.epoch}",
            f"stop after epoch {best.epoch} ({_STOP}), {_STRONGER}",
            since,
        )
    return _judge_learning(points, best, sign)


def _judge_learning(points: Sequence[Point], best: Point, sign: float) -> Verdict:
    """Judge a fit that neither diverges nor over-fits."""
    first, last = points[0], points[-1]
    learned = first.val - best.val
    shown = f"gap {_interval(last)} at epoch {last.epoch}"
    if last.gap_margin > _NOISY * max(learned, first.train - last.train) and last.gap_margin > 0:
        return Verdict(
            "cannot tell",
            f"too noisy: {shown}, while {_number(learned)} was learned on the validation sample",
            "more samples (samples=…), or more epochs",
        )
    late = points[-1 - max(len(points) // _LATE, 1)]
    improves = late.val - last.val >= _SMALL * learned
    is_small = last.gap <= max(_SMALL * learned, last.gap_margin)
    if learned <= 0 or (is_small and improves):
        what = "nothing was learned on the validation sample" if learned <= 0 else f"{shown}, and both samples still improve"
        return Verdict("under-fits", what, _WEAKER)
    return Verdict("fits", f"{shown}, best validation {_number(sign * best.val)} at epoch {best.epoch}", _KEEP)


def _too_few(points: Sequence[Point]) -> Verdict:
    count = f"{len(points)} epoch{'' if len(points) == 1 else 's'}"
    return Verdict(
        "cannot tell",
        f"only {count} evaluated, of at least {ENOUGH}",
        "more epochs (max_epochs), or validate more often (check_val_every_n_epoch, every_n_epochs)",
    )


def _diverges(points: Sequence[Point]) -> bool:
    first, last = points[0], points[-1]
    margins = sum(margin for margin in (first.train_margin, last.train_margin) if not math.isnan(margin))
    return not (math.isfinite(last.train) and math.isfinite(last.val)) or last.train - first.train > margins


def _overfits(last: Point, best: Point) -> bool:
    has_gap = last.gap > last.gap_margin
    is_worse = last.rise > last.rise_margin
    has_grown = last.gap - last.gap_margin > best.gap + best.gap_margin
    return has_gap and (is_worse or has_grown)


def _values(point: Point, sign: float) -> str:
    return f"train {_number(sign * point.train)} and validation {_number(sign * point.val)}"


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


_STOP = "EarlyStopping or ModelCheckpoint(monitor='reg/…/val')"
_STRONGER = "more data or augmentation, or more regularization: WeightDecay, L2Penalty, DropoutInjection, WeightNoise"
_WEAKER = "more epochs, a larger learning rate, a larger model, or less regularization (strength, p, weight_decay)"
_CALM = "a smaller learning rate, GradientNormClipping, NonFiniteGradientGuard"
_KEEP = "nothing needs to change; to gain more, compare techniques with lightning_reg.tuning"
