"""The curves of a fit: one metric on a sample of the training data and a sample of the validation data, by epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lightning_reg.monitors.statistics import difference, estimate, paired_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.monitors.evaluation import Measured


class Point(NamedTuple):
    """The metric after an epoch, on fixed samples. Smaller is better: a metric to maximize has its sign changed.

    Args:
        epoch: The number of the epoch.
        train: The metric on the training sample.
        val: The metric on the validation sample.
        gap: val − train.
        rise: val minus the smallest val of an earlier epoch, on the same batches; 0 in the first epoch.
        train_margin, val_margin, gap_margin, rise_margin: Half the width of the 95% interval of each; NaN if unknown.
    """

    epoch: int
    train: float
    val: float
    gap: float
    rise: float
    train_margin: float = math.nan
    val_margin: float = math.nan
    gap_margin: float = math.nan
    rise_margin: float = math.nan


def point_of(epoch: int, train: Measured, val: Measured, sign: float, best: Sequence[float]) -> Point:
    """Return the point that an epoch adds to the curves.

    Args:
        epoch: The number of the epoch.
        train: The metric on the training sample.
        val: The metric on the validation sample.
        sign: 1 if smaller is better, -1 if larger is.
        best: The values of the best epoch so far on the batches of the validation sample; empty if there is none.
    """
    if not (train.values and val.values):
        return Point(epoch, sign * train.value, sign * val.value, sign * (val.value - train.value), math.nan)
    means = [estimate(sample.values, sample.weights) for sample in (train, val)]
    gap = difference(means[1], means[0])
    rise = paired_difference(val.values, best or val.values, val.weights)
    return Point(
        epoch,
        sign * train.value,
        sign * val.value,
        sign * gap.mean,
        sign * rise.mean,
        *(found.margin for found in (*means, gap, rise)),
    )
