"""Gradient noise: its variance, its schedule, and its reproducibility."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Classifier, fit, parameter, same
from torch import nn
from torch.testing import assert_close

from lightning_reg import GradientNoise
from lightning_reg._engine.plan import Step
from lightning_reg._tensors.random import generator_for
from lightning_reg.functional import add_gradient_noise_


def noise_at(callback, step, size=40_000):
    p = nn.Parameter(torch.zeros(size))
    p.grad = torch.zeros(size)
    callback.update(0.0)
    callback.gradients([p], None, Step(step))
    return p.grad


@pytest.mark.parametrize("step", [0, 9, 999])
def test_variance_decays_as_published(step):
    """The standard deviation of n draws is within 5 standard errors, σ/√(2n), in all but one of a million runs."""
    noise, expected = noise_at(GradientNoise(0.3), step), math.sqrt(0.3**2 / (1 + step) ** 0.55)
    tolerance = 5 * expected / math.sqrt(2 * len(noise))
    assert_close(noise.std().item(), expected, rtol=0.0, atol=tolerance)
    assert_close(noise.mean().item(), 0.0, rtol=0.0, atol=5 * expected / math.sqrt(len(noise)))
    assert abs(noise.std().item() - 0.3 / (1 + step) ** 0.55) > tolerance or step == 0  # σ decays at another rate


def test_noise_depends_only_on_seed_name_and_step():
    noise = noise_at(GradientNoise(0.1), 3)
    assert torch.equal(noise, noise_at(GradientNoise(0.1), 3))
    for other in (GradientNoise(0.1, seed=1), GradientNoise(0.1, name="other")):
        assert not torch.equal(noise, noise_at(other, 3))
    assert not torch.equal(noise / noise.std(), noise_at(GradientNoise(0.1, decay=0.0), 4))


def test_noise_does_not_use_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise_at(GradientNoise(0.1), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_with_noise_is_reproducible():
    assert same(fit([GradientNoise(0.1)]), fit([GradientNoise(0.1)]))
    assert not same(fit([GradientNoise(0.1)]), fit([GradientNoise(0.1, seed=1)]))


def test_noise_skips_parameters_without_gradient():
    p, q = parameter([0.0]), parameter([0.0], grad=[0.0])
    add_gradient_noise_([p, q], 1.0, generator_for("cpu", 0))
    assert p.grad is None
    assert q.grad != 0


def test_noise_of_other_rows_does_not_depend_on_padding():
    noisy, padded = (parameter([[0.0] * 3] * 4, grad=[[0.0] * 3] * 4) for _ in range(2))
    add_gradient_noise_([noisy], 1.0, generator_for("cpu", 0))
    add_gradient_noise_([padded], 1.0, generator_for("cpu", 0), padding=[2])
    assert not padded.grad[2].any()
    assert torch.equal(padded.grad[[0, 1, 3]], noisy.grad[[0, 1, 3]])


def test_weight_that_a_head_shares_has_no_padding_row():
    """Its row gets gradients from the head."""

    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 16, padding_idx=0)
            nn.init.zeros_(self.table.weight)
            self.net[4].weight = self.table.weight

    model = fit([GradientNoise(10.0)], Tied(), max_epochs=1, limit_train_batches=1)
    assert model.table.weight[0].abs().max() > 0.1


def test_sparse_gradient_raises():
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient noise needs a dense gradient, got a sparse one"):
        add_gradient_noise_([layer.weight], 1.0)


def test_scheduled_std():
    class Recorder(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.largest = max(getattr(self, "largest", 0.0), self.net[0].weight.grad.abs().max().item())

    without_noise, with_noise = (fit([GradientNoise(lambda progress, std=std: std)], Recorder()) for std in (0.0, 10.0))
    assert same(without_noise, fit(model=Recorder()))
    assert with_noise.largest > 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientNoise(-1.0), r"GradientNoise: std must be a number in \[0, inf\), got -1.0"),
        (lambda: GradientNoise(0.1, decay=-0.1), r"GradientNoise: decay must be a number in \[0, inf\), got -0.1"),
        (lambda: GradientNoise(0.1, seed=-1), r"GradientNoise: seed must be an integer in \[0, 2147483648\), got -1"),
    ],
    ids=["negative std", "negative decay", "negative seed"],
)
def test_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
