"""The statistics of a comparison, as functions of numbers.

Runs on overlapping training sets resemble each other, so the mean of their differences varies more than their spread suggests.
The corrected resampled t-test allows for that. With n differences d, their mean m, and their standard deviation s,

    t = m / (s √(1/n + overlap)),    overlap = n_test / n_train,

approximately follows Student's t distribution with n − 1 degrees of freedom. The uncorrected test has overlap = 0. It is valid
only if each split is fresh data.

Reference: C. Nadeau, Y. Bengio, "Inference for the Generalization Error", 2003.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from scipy.stats import nct, t as student_t

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PairedTest",
    "Verdict",
    "corrected_t_test",
    "holm",
    "judge",
    "one_standard_error",
    "power",
    "repeats_needed",
    "standard_error",
]

Verdict: TypeAlias = Literal["better", "plain", "undecided"]

LEVEL = 0.05
POWER = 0.8
MOST_REPEATS = 1_000_000


class PairedTest(NamedTuple):
    """The result of `corrected_t_test`.

    Attributes:
        mean: Mean of the differences.
        low: Lower bound of the mean at one-sided level α. The test finds a gain if it is above 0.
        high: Upper bound of the mean at one-sided level α.
        p_value: One-sided probability of such a mean, or a larger one, if there is no difference.
    """

    mean: float
    low: float
    high: float
    p_value: float


def standard_error(differences: Sequence[float], overlap: float) -> float:
    """Return s √(1/n + overlap), the standard error of the mean difference between splits that share data.

    Args:
        differences: The differences between paired runs, at least two.
        overlap: Test samples divided by training samples of a split, or 0 if no two splits share data.

    Raises:
        ValueError: If there are fewer than two differences, one is not finite, or ``overlap`` is negative or not finite.

    Example:
        >>> round(standard_error([1.0, 2.0, 3.0], overlap=0.0), 4)  # s / √n
        0.5774
    """
    if len(differences) < 2:
        raise ValueError(f"a standard error needs at least 2 differences, got {len(differences)}")
    if wrong := [value for value in differences if not math.isfinite(value)]:
        raise ValueError(f"differences must be finite, got {wrong[0]}")
    return stdev(differences) * math.sqrt(1 / len(differences) + _checked_overlap(overlap))


def corrected_t_test(differences: Sequence[float], overlap: float, level: float = LEVEL) -> PairedTest:
    """Return the corrected resampled t-test of "the mean difference is above 0".

    Args:
        differences: The differences between paired runs, positive where the candidate is better. At least two.
        overlap: Test samples divided by training samples of a split, or 0 if no two splits share data.
        level: One-sided level α of the bounds, in (0, 0.5).

    Returns:
        The mean, its bounds, and the one-sided p-value. Differences that are all 0 have a p-value of 1.

    Raises:
        ValueError: If there are fewer than two differences, one is not finite, or ``overlap`` or ``level`` is out of range.

    Example:
        >>> test = corrected_t_test([0.02, 0.01, 0.03, 0.02, 0.01], overlap=0.25)
        >>> round(test.mean, 3), round(test.p_value, 3)
        (0.018, 0.016)
        >>> round(corrected_t_test([0.02, 0.01, 0.03, 0.02, 0.01], overlap=0.0).p_value, 3)  # overconfident
        0.004

    Reference:
        C. Nadeau, Y. Bengio, "Inference for the Generalization Error", 2003.
    """
    _check_level(level)
    error, mean, freedom = standard_error(differences, overlap), fmean(differences), len(differences) - 1
    if error == 0:
        return PairedTest(mean, mean, mean, 0.0 if mean > 0 else 1.0)
    half = float(student_t.isf(level, freedom)) * error
    return PairedTest(mean, mean - half, mean + half, float(student_t.sf(mean / error, freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of tests: the probability of any false finding stays below the level.

    Sorted from the smallest, the i-th of m p-values becomes max over j ≤ i of min(1, (m − j + 1) p_j).

    Args:
        p_values: The p-value of each test, in [0, 1].

    Returns:
        The adjusted p-values, in the same order.

    Raises:
        ValueError: If a p-value is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Reference:
        S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values must be in [0, 1], got {wrong[0]}")
    adjusted, largest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def one_standard_error(values: Sequence[Sequence[float]]) -> int:
    """Return the index of the simplest candidate whose mean is within one standard error of the best mean.

    Args:
        values: For each candidate, from the simplest to the most complex, its value on each split, where higher is better.
            Candidates may have different numbers of values, but each needs at least two.

    Returns:
        The index of the first candidate with mean ≥ best mean − s/√n, where s and n are those of the best candidate.

    Raises:
        ValueError: If there is no candidate, or one has fewer than two values or a value that is not finite.

    Example:
        >>> one_standard_error([[0.5, 0.7], [0.8, 0.9], [0.85, 0.95]])  # 0.90 − 0.05 ≤ 0.85
        1

    Reference:
        L. Breiman, J. Friedman, R. Olshen, C. Stone, "Classification and Regression Trees", 1984.
    """
    if not values:
        raise ValueError("one_standard_error needs at least one candidate, got none")
    errors, means = [standard_error(each, overlap=0) for each in values], [fmean(each) for each in values]
    best = max(range(len(values)), key=means.__getitem__)
    return next(index for index, mean in enumerate(means) if mean >= means[best] - errors[best])


def power(effect: float, repeats: int, overlap: float, std: float = 1.0, level: float = LEVEL) -> float:
    """Return the probability that `corrected_t_test` finds a gain, if the differences are independent and normal.

    The statistic is (√n·effect/std + noise) / √(1 + n·overlap), a noncentral t variable that is scaled down.

    Args:
        effect: True mean of the differences.
        repeats: Number n of differences, at least 2.
        overlap: Test samples divided by training samples of a split.
        std: Standard deviation of one difference, above 0. For runs with standard deviation σ that correlate by ρ on
            one split, it is σ √(2 (1 − ρ)).
        level: One-sided level of the test, in (0, 0.5).

    Returns:
        A probability in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(power(effect=1.5, repeats=10, overlap=0.25), 2)
        0.86
    """
    _check_level(level)
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, got {repeats}")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std must be finite and above 0, got {std}")
    if not math.isfinite(effect):
        raise ValueError(f"effect must be finite, got {effect}")
    bound = float(student_t.isf(level, repeats - 1)) * math.sqrt(1 + repeats * _checked_overlap(overlap))
    found = float(nct.sf(bound, repeats - 1, effect * math.sqrt(repeats) / std))
    return min(1.0, max(0.0, found)) if math.isfinite(found) else float(effect * math.sqrt(repeats) / std > bound)


def repeats_needed(effect: float, std: float, overlap: float, level: float = LEVEL, target: float = POWER) -> float:
    """Return how many repeats find a gain of ``effect`` with probability ``target``.

    Args:
        effect: True mean of the differences, above 0.
        std: Standard deviation of one difference, at least 0.
        overlap: Test samples divided by training samples of a split.
        level: One-sided level of the test, in (0, 0.5).
        target: The probability to reach, in (0, 1).

    Returns:
        The smallest such number, or infinity. It is infinite if effect ≤ z·std·√overlap, where z is the normal quantile of
        ``level``: the splits share so much data that no number of them is enough. Then a smaller test set helps, or more data.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> repeats_needed(effect=1.0, std=1.0, overlap=0.0)
        8
        >>> repeats_needed(effect=1.0, std=1.0, overlap=0.5)
        inf
    """
    if not (math.isfinite(effect) and effect > 0):
        raise ValueError(f"effect must be finite and above 0, got {effect}")
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"std must be finite and at least 0, got {std}")
    if not 0 < target < 1:
        raise ValueError(f"target must be in (0, 1), got {target}")
    if std == 0:
        return 2
    if power(effect, MOST_REPEATS, overlap, std, level) < target:
        return math.inf
    most = 2
    while power(effect, most, overlap, std, level) < target:
        most *= 2
    numbers = range(2, most + 1)
    return numbers[bisect_left(numbers, target, key=lambda repeats: power(effect, repeats, overlap, std, level))]


def judge(test: PairedTest, p_value: float, rope: float, level: float = LEVEL) -> Verdict:
    """Return the verdict of a test between a candidate and the plain model.

    Args:
        test: The test of the differences, positive where the candidate is better.
        p_value: Its p-value, adjusted where several candidates are tested.
        rope: The smallest difference that matters, at least 0.
        level: One-sided level of the test.

    Returns:
        ``"better"`` if the p-value is at most ``level``. ``"plain"`` if there is no gain that matters: the upper bound is below
        ``rope``, or all differences are 0. Otherwise ``"undecided"``.

    Raises:
        ValueError: If ``rope`` is negative or NaN.

    Example:
        >>> judge(PairedTest(mean=0.02, low=0.01, high=0.03, p_value=0.01), p_value=0.02, rope=0.005)
        'better'
        >>> judge(PairedTest(mean=0.00, low=-0.01, high=0.01, p_value=0.5), p_value=1.0, rope=0.02)
        'plain'
    """
    if not rope >= 0:
        raise ValueError(f"rope must be at least 0, got {rope}")
    if p_value <= level:
        return "better"
    return "plain" if test.high < rope or test.low == test.mean == test.high == 0 else "undecided"


def _checked_overlap(overlap: float) -> float:
    if not (math.isfinite(overlap) and overlap >= 0):
        raise ValueError(f"overlap must be finite and at least 0 (test samples / training samples), got {overlap}")
    return overlap


def _check_level(level: float) -> None:
    if not 0 < level < 0.5:
        raise ValueError(f"level must be in (0, 0.5), got {level}")
