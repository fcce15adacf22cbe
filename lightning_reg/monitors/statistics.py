"""Estimates of the mean over all samples from batches: standard errors, and intervals of means and differences.

The mean of a batch of n samples has the variance σ²/n. So batches are weighted by their sizes, and the spread of their means
reveals σ².
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVEL = 0.95
"""The confidence level of intervals."""

_TERMS = 200  # of a continued fraction
_HALVINGS = 50  # of the interval in which a quantile lies


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Args:
        mean: The mean.
        error: Its standard error; NaN if there are too few batches to know.
        freedom: The degrees of freedom of the standard error.
    """

    mean: float
    error: float
    freedom: float

    @property
    def margin(self) -> float:
        """Half the width of the interval; NaN if the standard error is unknown."""
        return self.error * t_quantile((1 + LEVEL) / 2, self.freedom) if self.error > 0 else self.error

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that contains the true value with a probability of 95%."""
        return self.mean - self.margin, self.mean + self.margin


def estimate(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Estimate a mean over samples from the means of batches.

    m = Σ wᵢxᵢ / Σ wᵢ, with the variance Σ wᵢ(xᵢ − m)² / ((k − 1) Σ wᵢ) and k − 1 degrees of freedom.

    Args:
        values: The means xᵢ of k batches.
        weights: The sizes wᵢ of the batches.

    Example:
        >>> estimate([1.0, 2.0, 3.0, 2.0], [8, 8, 8, 24])
        Estimate(mean=2.0, error=0.3333333333333333, freedom=3)
    """
    total = math.fsum(weights)
    mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    freedom = len(values) - 1
    if freedom < 1:
        return Estimate(mean, math.nan, freedom)
    spread = math.fsum(w * (x - mean) ** 2 for w, x in zip(weights, values, strict=True))
    return Estimate(mean, math.sqrt(spread / (freedom * total)), freedom)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Estimate the first mean minus the second one, for independent samples of unequal variance (Welch).

    The degrees of freedom are those of Welch and Satterthwaite: (a + b)² / (a²/ν₁ + b²/ν₂) for the variances a and b.

    Example:
        >>> difference(Estimate(2.0, 3.0, 8), Estimate(1.5, 4.0, 8))
        Estimate(mean=0.5, error=5.0, freedom=14.836795252225519)
    """
    mean = first.mean - second.mean
    a, b = first.error**2, second.error**2
    if not a + b > 0:
        return Estimate(mean, a + b, max(first.freedom, second.freedom))
    return Estimate(mean, math.sqrt(a + b), (a + b) ** 2 / (a**2 / first.freedom + b**2 / second.freedom))


def paired_difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Estimate the first mean minus the second one, both measured on the same batches.

    The difficulty of each batch cancels out, so this is much more precise than :func:`difference`.

    Example:
        >>> paired_difference([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], [8, 8, 8])
        Estimate(mean=0.5, error=0.0, freedom=2)
    """
    return estimate([x - y for x, y in zip(first, second, strict=True)], weights)


def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: In [0.5, 1).
        freedom: The degrees of freedom, > 0.

    Example:
        >>> round(t_quantile(0.975, 19), 4)
        2.093
    """
    low, high = 0.0, 1.0
    while _upper_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _upper_tail(middle, freedom) > 1 - probability else (low, middle)
    return high


def _upper_tail(t: float, freedom: float) -> float:
    """Return P(T > t) for t ≥ 0: half the regularized incomplete beta function at ν/(ν + t²)."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return I_x(a, b), from the side on which its continued fraction converges fast."""
    if x in (0.0, 1.0):
        return x
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _fraction(b, a, 1 - x) / b
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function, evaluated backward: 1/(1 + d₁/(1 + d₂/(1 + …)))."""
    value = 1.0
    for n in range(_TERMS, 0, -1):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + term / value
    return 1 / value
