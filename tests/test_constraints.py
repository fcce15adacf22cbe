from __future__ import annotations

import math

import pytest
import torch
from helpers import Classifier, fit, same
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close

from lightning_reg import Linear, WeightClipping
from lightning_reg.functional import clip_weights_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_is_the_nearest_point_idempotent_and_the_identity_inside(dtype):
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype) for shape in [(3, 4), (7,), (), (0, 5)]]
    before = [p.clone() for p in params]
    clip_weights_(params, 0.5)
    assert_close(params, [p.clamp(-0.5, 0.5) for p in before], rtol=0.0, atol=0.0)
    once = [p.clone() for p in params]
    clip_weights_(params, 0.5)
    clip_weights_(params, 0.6)
    clip_weights_(params, math.inf)
    assert_close(params, once, rtol=0.0, atol=0.0)
    clip_weights_([], 1.0)


class Watch(Classifier):
    """Keeps the largest weight and bias after each step."""

    def on_train_start(self):
        self.largest = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.largest.append((self.net[4].weight.abs().max().item(), self.net[4].bias.abs().max().item()))


def test_weights_are_within_bounds_after_every_step_and_biases_are_left_alone():
    model = fit([WeightClipping(0.05)], Watch(), max_epochs=3)
    assert {weight for weight, _ in model.largest} == {torch.tensor(0.05).item()}
    assert max(bias for _, bias in model.largest) > 0.05
    unclipped = fit(model=Watch(), max_epochs=3)
    assert min(weight for weight, _ in unclipped.largest) > 0.05


def test_it_acts_after_each_optimizer_step_and_not_after_each_batch():
    """Clamping between the micro-batches would change what they see."""

    class ByHand(Classifier):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            for i in (0, 4):
                self.net[i].weight.data.clamp_(-0.05, 0.05)

    for accumulate in (1, 2):
        assert same(
            fit([WeightClipping(0.05)], accumulate_grad_batches=accumulate),
            fit(model=ByHand(), accumulate_grad_batches=accumulate),
        )


def test_a_step_that_the_loss_scaler_skips_is_no_step():
    class Overflows(Watch):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 0 else 1.0)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    model = fit([WeightClipping(0.05)], Overflows(), plugins=[precision], max_epochs=1)
    assert model.largest[0][0] == Classifier().net[4].weight.abs().max().item()
    assert model.largest[1][0] == torch.tensor(0.05).item()


def test_the_bound_may_be_scheduled():
    model = fit([WeightClipping(Linear(0.05, 0.01))], Watch(), max_epochs=1)
    assert_close([weight for weight, _ in model.largest], [0.05, 0.04, 0.03, 0.02], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("clip_value", [0, -1, float("nan")])
def test_bounds_out_of_range_are_refused(clip_value):
    with pytest.raises(ValueError, match=rf"WeightClipping: clip_value must be a number in \(0, inf\], got {clip_value}"):
        WeightClipping(clip_value)
