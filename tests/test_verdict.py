"""The rules of a verdict, on synthetic curves and on fits whose outcome is known."""

from __future__ import annotations

import math
import re
from functools import partial

import lightning.pytorch.callbacks
import pytest
import torch
from helpers import seed
from test_overfitting import Model, part, run
from torch.utils.data import DataLoader, TensorDataset

import lightning_reg
from lightning_reg import OverfittingMonitor
from lightning_reg.monitors.curves import Point
from lightning_reg.monitors.verdict import judge


def curves(train, val, margin=0.02, rise_margin=0.01, epochs=None):
    """Return points with equal margins."""
    found, best = [], math.inf
    for number, (t, v) in enumerate(zip(train, val, strict=True)):
        rise = v - best if math.isfinite(best) else 0.0
        best = min(best, v)
        epoch = epochs[number] if epochs else number
        found.append(Point(epoch, t, v, v - t, rise, margin, margin, margin, rise_margin))
    return found


FALLING = [1.0, 0.6, 0.4, 0.3, 0.25, 0.22, 0.2, 0.19, 0.18]
CASES = {
    "over-fits": curves(FALLING, [1.1, 0.8, 0.7, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0]),
    "over-fits, flat": curves(FALLING, [1.1, 0.8, 0.7, 0.6, 0.605, 0.602, 0.604, 0.601, 0.603]),
    "fits": curves(FALLING, [1.1, 0.7, 0.5, 0.4, 0.36, 0.34, 0.33, 0.325, 0.324]),
    "fits without a gap": curves([1.0, 0.6, 0.5, 0.5, 0.5, 0.5], [1.0, 0.6, 0.5, 0.5, 0.5, 0.5]),
    "one bad epoch": curves(FALLING, [1.1, 0.7, 0.5, 0.4, 0.36, 0.34, 0.33, 0.325, 0.5]),
    "under-fits": curves([2.3, 2.2, 2.1, 2.0, 1.9, 1.8], [2.31, 2.21, 2.11, 2.01, 1.91, 1.81]),
    "under-fits, nothing learned": curves([2.3, 2.3, 2.3, 2.3], [2.3, 2.3, 2.31, 2.3]),
    "diverges": curves([1.0, 1.2, 1.9, 3.0], [1.1, 1.3, 1.9, 3.1]),
    "diverges late": curves([1.0, 0.5, 0.3, 0.8], [1.0, 0.6, 0.4, 0.9]),
    "diverges to NaN": curves([1.0, 0.5, math.nan], [1.0, 0.6, math.nan]),
    "diverges to infinity": curves([1.0, 0.5, 0.4], [1.0, 0.6, math.inf]),
    "cannot tell, too few": curves([1.0, 0.5], [1.0, 0.6]),
    "cannot tell, none": [],
    "cannot tell, too noisy": curves(FALLING, [1.1, 0.8, 0.7, 0.65, 0.7, 0.7, 0.7, 0.7, 0.7], margin=0.9, rise_margin=0.9),
    "cannot tell, no interval": curves(FALLING, FALLING, margin=math.nan, rise_margin=math.nan),
}
EXPECTED = {
    "over-fits": ("over-fits", 4, "train went from 0.3 to 0.18 and validation from 0.65 to 1 between epochs 3 and 8"),
    "over-fits, flat": ("over-fits", 4, "validation from 0.6 to 0.603"),
    "fits": ("fits", None, "the gap is 0.144 (0.124 to 0.164) at epoch 8, and validation was best at epoch 8 with 0.324"),
    "fits without a gap": ("fits", None, "the gap is 0 (-0.02 to 0.02) at epoch 5"),
    "one bad epoch": ("fits", None, "best at epoch 7"),
    "under-fits": ("under-fits", None, "and validation still went from 2.01 to 1.81 between epochs 3 and 5"),
    "under-fits, nothing learned": ("under-fits", None, "nothing was learned"),
    "diverges": ("diverges", None, "the metric on the training sample went from 1 at epoch 0 to 3 at epoch 3"),
    "diverges late": ("diverges", None, "the metric on the training sample went from 0.3 at epoch 2 to 0.8 at epoch 3"),
    "diverges to NaN": ("diverges", None, "the metric is not finite at epoch 2"),
    "diverges to infinity": ("diverges", None, "the metric is not finite at epoch 2"),
    "cannot tell, too few": ("cannot tell", None, "2 epochs evaluated, but a verdict needs 3"),
    "cannot tell, none": ("cannot tell", None, "0 epochs evaluated"),
    "cannot tell, too noisy": ("cannot tell", None, "the gap is 0.52 (-0.38 to 1.42) at epoch 8, too uncertain for curves"),
    "cannot tell, no interval": ("cannot tell", None, "the gap has no interval"),
}


@pytest.mark.parametrize("case", CASES)
def test_synthetic_curves(case):
    verdict = judge(CASES[case])
    kind, since, reason = EXPECTED[case]
    assert (verdict.kind, verdict.since) == (kind, since), verdict
    assert reason in verdict.reason


@pytest.mark.parametrize("case", CASES)
def test_scale_does_not_matter(case):
    """The same curves in other units, and at other epochs, get the same verdict."""
    scaled = [Point(3 * p.epoch + 5, *(1000 * value for value in p[1:])) for p in CASES[case]]
    verdict = judge(scaled)
    kind, since, _ = EXPECTED[case]
    assert verdict.kind == kind
    assert verdict.since == (None if since is None else 3 * since + 5)


def test_metrics_to_maximize_are_reported_as_they_are():
    accuracy = curves([-0.5, -0.8, -0.95, -0.99, -1.0], [-0.5, -0.7, -0.72, -0.66, -0.6])
    verdict = judge(accuracy, sign=-1.0, name="mine")
    assert str(verdict).startswith("over-fits since epoch 3: train went from 0.95 to 1 and validation from 0.72 to 0.6 between")
    assert "'reg/mine/val'" in verdict.advice


def test_advice_names_callbacks_that_exist():
    texts = [judge(points).advice for points in CASES.values()]
    named = {name for text in texts for name in re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", text)}
    assert len(named) >= 6
    assert all(hasattr(lightning_reg, name) or hasattr(lightning.pytorch.callbacks, name) for name in named), named
    assert all(text[0].isupper() and text[-1] not in ".:" for text in texts)


def test_one_noisy_epoch_more_or_less_is_not_overfitting():
    """Flat curves with random noise within the margins are rarely said to over-fit."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(200):
        noise = 0.005 * torch.randn(2, 12, generator=generator)
        level = torch.tensor([1.0, 0.7, *[0.5] * 10])
        train, val = (level + noise[0] - 0.1).tolist(), (level + noise[1]).tolist()
        wrong += judge(curves(train, val, margin=0.02, rise_margin=0.02)).kind == "over-fits"
    assert wrong <= 10


# Real fits -----------------------------------------------------------------------------------------------------------


def wrong_labels(count, share):
    """Return a loader of digits of which a share of the labels is drawn at random."""
    images, labels = part(0, count).dataset.tensors
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 10, (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < share
    return DataLoader(TensorDataset(images, torch.where(wrong, drawn, labels)), batch_size=16, shuffle=True)


class Wide(Model):
    def __init__(self, **options):
        super().__init__(**options)
        seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


class Accelerates(Wide):
    """Its learning rate grows from one that is right to one that is far too large."""

    def on_train_epoch_start(self):
        self.optimizers().param_groups[0]["lr"] = 0.05 * 4**self.current_epoch


FITS = {
    "over-fits": partial(run, model=lambda: Wide(lr=0.1), train=lambda: wrong_labels(200, 0.4), max_epochs=25),
    "under-fits": partial(run, model=lambda: Wide(lr=0.02), train=lambda: wrong_labels(300, 0.0), max_epochs=4),
    "diverges": partial(run, model=Accelerates, max_epochs=5),
    "cannot tell": partial(run, max_epochs=2),
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_fits_with_a_known_outcome(kind):
    options = FITS[kind].keywords
    made = {name: make() if callable(make) else make for name, make in options.items()}
    monitor = OverfittingMonitor(metric="val/loss")
    run([monitor], **made)
    assert monitor.verdict.kind == kind, (monitor.verdict, monitor.points)
