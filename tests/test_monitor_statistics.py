"""The statistics of monitors, against scipy and by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_reg.monitors.statistics import Estimate, difference, estimate, paired_difference, t_quantile


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 3.7, 19, 38.5, 1234.5, 1e6])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.9, 0.975, 0.999])
def test_quantiles_are_scipys(probability, freedom):
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), abs=1e-9, rel=1e-7)


def test_equal_batches_give_the_textbook_interval():
    values = [0.3, 0.1, 0.7, 0.4, 0.45]
    expected = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert estimate(values, [8] * 5).interval == pytest.approx(expected)


def test_difference_is_welchs():
    first, second = [0.3, 0.1, 0.7, 0.4, 0.45], [1.3, 2.1, 0.2]
    found = difference(estimate(first, [4] * 5), estimate(second, [4] * 3))
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_paired_difference_is_that_of_one_sample():
    first, second = [0.3, 0.1, 0.7, 0.4], [0.25, 0.12, 0.5, 0.3]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert paired_difference(first, second, [4] * 4).interval == pytest.approx((expected.low, expected.high))


def test_weights_are_batch_sizes():
    """The mean is that over samples, and the standard error is right on average: batches of n have variance σ²/n."""
    sizes = [10, 10, 10, 10, 2]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, sum(sizes), generator=generator)
    batches = [part.mean(dim=1) for part in samples.split(sizes, dim=1)]
    found = [estimate(values, sizes) for values in torch.stack(batches, dim=1).tolist()]
    means = torch.tensor([one.mean for one in found])
    assert means.tolist() == pytest.approx(samples.mean(dim=1).tolist(), abs=1e-6)
    assert sum(one.error**2 for one in found) / len(found) == pytest.approx(1 / sum(sizes), rel=0.06)
    unweighted = [estimate(values, [1] * 5).error ** 2 for values in torch.stack(batches, dim=1).tolist()]
    assert sum(unweighted) / len(found) > 1.5 / sum(sizes)  # a negative control


def covered(sizes: list[int], scales: tuple[float, float], margin) -> float:
    """Return how often the interval of a difference contains the truth, for skewed samples like losses."""
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(2000):
        first, second = (
            estimate(
                [float(part.mean()) for part in (scale * torch.rand(sum(sizes), generator=generator).log()).split(sizes)], sizes
            )
            for scale in scales
        )
        found = difference(first, second)
        hits += abs(found.mean - (scales[1] - scales[0])) <= margin(found)
    return hits / 2000


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.1, 1.0)], ids=["equal", "unequal"])
def test_intervals_cover(scales):
    sizes = [10] * 20 + [3]
    assert 0.925 < covered(sizes, scales, lambda found: found.margin) < 0.97
    assert covered(sizes[:3], scales, lambda found: 1.96 * found.error) < 0.93  # a negative control


def test_edges():
    one = estimate([0.5], [3])
    assert one.mean == 0.5
    assert math.isnan(one.error)
    assert all(math.isnan(bound) for bound in difference(one, one).interval)
    assert estimate([1.0, 1.0], [3, 3]).interval == (1.0, 1.0)
    assert difference(Estimate(1.0, 0.0, 3), Estimate(0.5, 0.0, 3)).interval == (0.5, 0.5)
