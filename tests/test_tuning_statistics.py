"""The statistics of comparisons, against other libraries, published numbers, and simulations."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import combinations
from statistics import stdev

import numpy as np
import pytest
from processes import ROOT
from sklearn.datasets import make_moons
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.svm import SVC

from lightning_reg.tuning.statistics import (
    corrected_t_test,
    holm,
    one_standard_error,
    power,
    repeats_needed,
    standard_error,
)

baycomp = pytest.importorskip("baycomp")

BETTER = 0.05


def test_the_corrected_test_is_that_of_baycomp() -> None:
    random = np.random.default_rng(0)
    for folds in (3, 5, 10):
        first, second = random.normal(0.5, 1, folds), random.normal(0, 1, folds)
        test = corrected_t_test([float(d) for d in first - second], overlap=1 / (folds - 1))
        left, right = baycomp.two_on_single(second, first, rope=0, runs=1)
        assert test.p_value == pytest.approx(left, abs=1e-6), (left, right)
        plain = corrected_t_test([float(d) for d in first - second], overlap=0)
        assert abs(plain.p_value - left) > 1e-3  # without the correction, the numbers differ


def test_the_corrected_test_gives_the_published_numbers_of_a_cross_validation() -> None:
    """scikit-learn's user guide, "Statistical comparison of models using grid search": t = 0.750, p = 0.227."""
    images, labels = make_moons(noise=0.352, random_state=1, n_samples=100)
    splits = RepeatedStratifiedKFold(n_splits=10, n_repeats=10, random_state=0)
    rbf, linear = (
        cross_val_score(SVC(kernel=kernel, random_state=0), images, labels, cv=splits, scoring="roc_auc")
        for kernel in ("rbf", "linear")
    )
    test = corrected_t_test([float(d) for d in rbf - linear], overlap=10 / 90)
    assert test.mean / standard_error([float(d) for d in rbf - linear], 10 / 90) == pytest.approx(0.750, abs=5e-4)
    assert test.p_value == pytest.approx(0.227, abs=5e-4)


def test_bounds_and_p_value_agree() -> None:
    for seed in range(50):
        differences = [float(d) for d in np.random.default_rng(seed).normal(0.5, 1, 8)]
        test = corrected_t_test(differences, overlap=0.25)
        assert (test.low > 0) == (test.p_value < BETTER)
        mirrored = corrected_t_test([-d for d in differences], overlap=0.25)
        assert mirrored.p_value == pytest.approx(1 - test.p_value)
        assert (mirrored.low, mirrored.high) == pytest.approx((-test.high, -test.low))


@pytest.mark.parametrize(("difference", "p_value"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_differences_without_spread(difference: float, p_value: float) -> None:
    assert corrected_t_test([difference] * 5, 0.25) == (difference, difference, difference, p_value)


def error_rates(studies: int, repeats: int, ratio: float, share: float, shift: float = 0.0) -> tuple[float, float]:
    """Return how often the corrected and the uncorrected test find a gain where splits share a part of their variance."""
    random = np.random.default_rng(0)
    common = random.normal(size=(studies, 1)) * math.sqrt(share)
    differences = shift + common + random.normal(size=(studies, repeats)) * math.sqrt(1 - share)
    tests = [
        [corrected_t_test(list(map(float, row)), overlap).p_value <= BETTER for overlap in (ratio, 0)] for row in differences
    ]
    corrected, uncorrected = np.mean(tests, axis=0)
    return float(corrected), float(uncorrected)


def test_the_correction_keeps_the_error_where_splits_share_data() -> None:
    """The differences correlate by ratio / (1 + ratio), as the correction assumes: a fifth at a ratio of 1/4."""
    corrected, uncorrected = error_rates(studies=4000, repeats=10, ratio=0.25, share=0.2)
    assert abs(corrected - BETTER) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert uncorrected > 0.15


def test_the_uncorrected_test_is_right_for_independent_splits() -> None:
    corrected, uncorrected = error_rates(studies=4000, repeats=10, ratio=0.25, share=0.0)
    assert abs(uncorrected - BETTER) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert corrected < 0.01


@pytest.mark.parametrize(("ratio", "powers"), [(1 / 9, (0.74, 0.97)), (1 / 4, (0.51, 0.86)), (1 / 2, (0.24, 0.61))])
def test_power_is_that_of_a_simulation(ratio: float, powers: tuple[float, float]) -> None:
    for correlation, expected in zip((0.0, 0.5), powers, strict=True):
        std = math.sqrt(2 * (1 - correlation))
        predicted = power(1.5, 10, ratio, std)
        found, _ = error_rates(studies=3000, repeats=10, ratio=ratio, share=0.0, shift=1.5 / std)
        assert predicted == pytest.approx(expected, abs=0.006)
        assert predicted == pytest.approx(found, abs=4 * math.sqrt(0.25 / 3000))


def test_power_of_no_effect_is_the_level() -> None:
    assert power(0.0, 10, 0.0) == pytest.approx(BETTER)
    assert power(0.0, 10, 0.0, level=0.01) == pytest.approx(0.01)


@pytest.mark.parametrize(("effect", "std", "overlap"), [(1, 1, 0), (1.5, 1, 0.25), (0.5, 1, 0.01), (0.05, 1, 0)])
def test_repeats_needed_is_the_smallest_number_with_the_power(effect: float, std: float, overlap: float) -> None:
    repeats = repeats_needed(effect, std, overlap)
    assert power(effect, int(repeats), overlap, std) >= 0.8 > power(effect, int(repeats) - 1, overlap, std)


def test_no_number_of_repeats_is_enough_where_the_splits_share_too_much() -> None:
    bound = 1.6448536 * math.sqrt(0.5)
    assert repeats_needed(0.99 * bound, 1.0, 0.5) == math.inf
    assert repeats_needed(1.05 * bound, 1.0, 0.5) < math.inf
    assert repeats_needed(1.0, 0.0, 0.5) == 2


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    """A hypothesis is rejected if every set of hypotheses that contains it is: an independent definition."""
    random = np.random.default_rng(0)
    for count in range(1, 6):
        p = [float(x) for x in random.uniform(0, 0.2, count)]
        sets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(count)]
        assert holm(p) == pytest.approx(closed)
    assert holm([]) == []


def test_holm_keeps_the_order_of_equal_p_values() -> None:
    assert holm([0.02, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])


def test_one_standard_error_takes_the_simplest_within_one_error_of_the_best() -> None:
    best = [0.8, 0.9, 1.0]  # mean 0.9, standard error 0.0577
    assert one_standard_error([[0.84] * 3, [0.8425] * 3, best]) == 1
    assert one_standard_error([[0.84] * 3, best]) == 1
    assert one_standard_error([best, [0.1] * 3]) == 0
    assert stdev(best) / math.sqrt(3) == pytest.approx(0.0577, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrected_t_test([1.0], 0), "at least 2 differences, got 1"),
        (lambda: corrected_t_test([1.0, math.nan], 0), "must be finite, got nan"),
        (lambda: corrected_t_test([1.0, 2.0], -0.1), "overlap must be finite and at least 0"),
        (lambda: corrected_t_test([1.0, 2.0], math.inf), "overlap must be finite and at least 0"),
        (lambda: corrected_t_test([1.0, 2.0], 0, level=0.5), "level must be in"),
        (lambda: holm([0.1, 1.1]), r"must be in \[0, 1\], got 1.1"),
        (lambda: holm([math.nan]), r"must be in \[0, 1\], got nan"),
        (lambda: one_standard_error([]), "at least one candidate"),
        (lambda: one_standard_error([[1.0]]), "at least 2 differences"),
        (lambda: power(1, 1, 0), "repeats must be at least 2, got 1"),
        (lambda: power(1, 5, 0, std=0), "std must be finite and above 0, got 0"),
        (lambda: power(math.inf, 5, 0), "effect must be finite, got inf"),
        (lambda: repeats_needed(0, 1, 0), "effect must be finite and above 0, got 0"),
        (lambda: repeats_needed(1, -1, 0), "std must be finite and at least 0, got -1"),
        (lambda: repeats_needed(1, 1, 0, target=1), r"target must be in \(0, 1\), got 1"),
    ],
    ids=range(15),
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_documentation_prints_the_power() -> None:
    lines = [
        line.split("|")[1:-1]
        for line in (ROOT / "docs" / "choosing.md").read_text().splitlines()
        if re.match(r"\| 1(/\d)? \(", line)
    ]
    assert len(lines) == 16
    for ratio, repeats, *printed in lines:
        overlap = float(Fraction(ratio.split()[0]))
        expected = [power(1.5, int(repeats), overlap, math.sqrt(2 * (1 - correlation))) for correlation in (0, 0.5, 0.75)]
        assert [float(number) for number in printed] == pytest.approx(expected, abs=0.006)
