from __future__ import annotations

import math

import pytest
import torch
from helpers import UNITS, Classifier, Gan, Memory, fit, same
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close

from lightning_reg import Linear, MaxNorm, MinMaxNorm, NonNegative, UnitNorm, WeightClipping
from lightning_reg._tensors import units as units_module
from lightning_reg.functional import (
    clip_negative_weights_,
    clip_weights_,
    group_soft_threshold_,
    project_unit_norms_,
    units_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_weights_is_idempotent_projection(dtype):
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


class Recorder(Classifier):
    """Records the largest weight and bias after each step."""

    def on_train_start(self):
        self.largest = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.largest.append((self.net[4].weight.abs().max().item(), self.net[4].bias.abs().max().item()))


def test_weight_clipping_bounds_weights_but_not_biases():
    model = fit([WeightClipping(0.05)], Recorder(), max_epochs=3)
    assert {weight for weight, _ in model.largest} == {torch.tensor(0.05).item()}
    assert max(bias for _, bias in model.largest) > 0.05
    unclipped = fit(model=Recorder(), max_epochs=3)
    assert min(weight for weight, _ in unclipped.largest) > 0.05


def test_weight_clipping_acts_after_optimizer_steps():
    """Clamping between micro-batches would change their gradients."""

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


def test_weight_clipping_ignores_steps_skipped_by_scaler():
    class Overflows(Recorder):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 0 else 1.0)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    model = fit([WeightClipping(0.05)], Overflows(), plugins=[precision], max_epochs=1)
    assert model.largest[0][0] == Classifier().net[4].weight.abs().max().item()
    assert model.largest[1][0] == torch.tensor(0.05).item()


def test_scheduled_clip_value():
    model = fit([WeightClipping(Linear(0.05, 0.01))], Recorder(), max_epochs=1)
    assert_close([weight for weight, _ in model.largest], [0.05, 0.04, 0.03, 0.02], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("clip_value", [0, -1, float("nan")])
def test_clip_value_out_of_range_raises(clip_value):
    with pytest.raises(ValueError, match=rf"WeightClipping: clip_value must be a number in \(0, inf\], got {clip_value}"):
        WeightClipping(clip_value)


INTERVALS = [(0.0, 1.5), (1.0, 1.0), (2.0, 3.0), (0.0, math.inf)]


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize(("low", "high"), INTERVALS)
@pytest.mark.parametrize(
    ("layer", "units"), [pytest.param(layer, units, id=type(layer).__name__) for layer, units in UNITS.items()]
)
def test_project_unit_norms_matches_formula(layer, units, low, high, rate):
    torch.manual_seed(0)
    w = torch.randn(layer.weight.shape)
    expected = []
    for unit in units(w.double()):
        norm = unit.norm()
        expected.append(unit * ((1 - rate) + rate * min(max(norm.item(), low), high) / norm))
    project_unit_norms_([w], low, high, rate, [units_of(layer)])
    assert_close([unit.double() for unit in units(w)], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dim", "layer"), [(0, nn.Linear(50, 30)), (1, nn.ConvTranspose2d(8, 9, 3))])
def test_max_norm_matches_torch_renorm(dim, layer):
    w = torch.randn(layer.weight.shape)
    expected = torch.renorm(w, p=2, dim=dim, maxnorm=2.0)
    other_dim = torch.renorm(w, p=2, dim=1 - dim, maxnorm=2.0)
    project_unit_norms_([w], 0.0, 2.0, units=[units_of(layer)])
    assert_close(w, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(w, other_dim, rtol=1e-2)


@pytest.mark.parametrize(("low", "high"), INTERVALS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_project_unit_norms_is_idempotent(low, high, dtype):
    """Keras divides by the norm plus a small constant, so weights within the bound shrink a little at each step."""
    torch.manual_seed(0)
    for shape in [(200, 3), (50, 768), (4, 20_000)]:
        once = torch.randn(shape).mul(torch.rand(shape[0], 1)).div(math.sqrt(shape[1]) / 2).to(dtype)
        project_unit_norms_([once], low, high)
        twice = once.clone()
        for _ in range(3):
            project_unit_norms_([twice], low, high)
        assert torch.equal(once, twice)
        norms, precise = once.double().norm(dim=1), torch.promote_types(dtype, torch.float32)
        rounding = torch.finfo(dtype).eps + 2 * math.sqrt(shape[1]) * torch.finfo(precise).eps
        assert norms.min() >= low * (1 - rounding)
        assert norms.max() <= high * (1 + rounding)


@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 1e4, 1e8])
def test_project_unit_norms_of_extreme_norms(ratio):
    torch.manual_seed(0)
    w = torch.randn(64, 16)
    w /= w.norm(dim=1, keepdim=True) * ratio
    project_unit_norms_([w], 1.0, 1.0)
    assert_close(w.norm(dim=1), torch.ones(64), rtol=1e-6, atol=0.0)
    again = w.clone()
    project_unit_norms_([again], 1.0, 1.0)
    assert torch.equal(w, again)


WIDE = [[3e19, 4e19], [3e-24, 4e-24], [3e38, 3e38], [1e-38, 0.0], [2e-44, 2e-44], [0.6, 0.8], [0.0, 0.0], [3.0, 4.0]]
EXTREME = {
    torch.float32: WIDE,
    torch.bfloat16: [row for row in WIDE if row != [2e-44, 2e-44]],  # 0 in bfloat16
    torch.float16: [[6e4, 6e4], [6e-8, 6e-8], [6e-5, 8e-5], [0.6, 0.8], [0.0, 0.0], [3.0, 4.0]],
}
"""Units at both ends of the range of a dtype."""
WIDE_INTERVALS = [(dtype, *interval) for dtype in (torch.float32, torch.bfloat16) for interval in [(0.0, 1e-30), (1e30, 1e31)]]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["CPU", "as on a device"])
@pytest.mark.parametrize(
    ("dtype", "low", "high"), [*((dtype, *interval) for dtype in EXTREME for interval in INTERVALS), *WIDE_INTERVALS]
)
def test_norms_do_not_overflow_or_underflow(low, high, dtype, on_cpu, monkeypatch):
    if not on_cpu:
        monkeypatch.setattr(units_module, "is_cpu", lambda tensor: False)
    w = torch.tensor(EXTREME[dtype]).to(dtype)
    before = w.clone()
    exact = w.double()
    norms = exact.norm(dim=1, keepdim=True)
    expected = torch.where(norms == 0, 0.0, exact * (norms.clamp(low, high) / norms))
    project_unit_norms_([w], low, high)
    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps}
    assert_close(w.double(), expected, **rounding)
    feasible = ((norms >= low) & (norms <= high) | (norms == 0)).flatten()
    assert torch.equal(w[feasible], before[feasible])
    once = w.clone()
    project_unit_norms_([w], low, high)
    assert torch.equal(w, once)


@pytest.mark.parametrize(
    ("layer", "units"), [pytest.param(layer, units, id=type(layer).__name__) for layer, units in UNITS.items()]
)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_units_of_each_layer(layer, units, scale):
    w = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0)) * scale
    expected = [unit / unit.norm() for unit in units(w.double())]
    project_unit_norms_([w], 1.0, 1.0, units=[units_of(layer)])
    assert_close([unit.double() for unit in units(w)], expected, rtol=1e-6, atol=1e-7)


def test_entries_of_a_bias_at_both_ends_of_the_range():
    w = torch.tensor([3e38, -1e-44, 0.0, 0.5, -1.0])
    project_unit_norms_([w], 1.0, 1.0)
    assert w.tolist() == [1.0, -1.0, 0.0, 1.0, -1.0]


def test_group_soft_threshold_at_both_ends_of_the_range():
    w = torch.tensor([[3e19, 4e19], [3e-24, 4e-24], [3e-26, 4e-26]])
    group_soft_threshold_([w], 1e-25)
    shrunk = 1 - 1e-25 * math.sqrt(2) / 5e-24
    assert_close(w, torch.tensor([[3e19, 4e19], [3e-24 * shrunk, 4e-24 * shrunk], [0.0, 0.0]]), rtol=1e-5, atol=0.0)


def test_max_norm_in_a_fit_recovers_from_large_weights():
    model = Classifier(lr=0.0)
    model.net[4].weight.data.mul_(1e20)
    direction = torch.nn.functional.normalize(model.net[4].weight.detach().double(), dim=1)
    fit([MaxNorm(1.0)], model, max_epochs=1, limit_train_batches=1)
    assert_close(model.net[4].weight.double(), direction, rtol=1e-5, atol=1e-7)


def test_zero_and_nan_units_do_not_affect_others():
    w = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]])
    project_unit_norms_([w], 1.0, 1.0)
    assert w[0].tolist() == [0, 0]
    assert w[1].isnan().all()
    assert_close(w[2], torch.tensor([0.6, 0.8]))
    project_unit_norms_([torch.zeros(0, 4), torch.zeros(4, 0)], 1.0, 1.0)
    zeros = torch.zeros(1, 2)
    project_unit_norms_([zeros], 1e10, 1e10)
    assert zeros.tolist() == [[0, 0]]


def test_infinite_bound_keeps_units_with_overflowing_norms():
    w = torch.tensor([[2e19, 2e19], [math.inf, 1.0]])
    project_unit_norms_([w], 0.0, math.inf)
    assert w.tolist() == torch.tensor([[2e19, 2e19], [math.inf, 1.0]]).tolist()


def test_non_negative_clips_selected_weights():
    theta = torch.tensor([-1.0, 0.0, 2.0, math.nan])
    clip_negative_weights_([theta])
    assert theta[:3].tolist() == [0, 0, 2]
    clip_negative_weights_([])
    model = fit([NonNegative(params="net.4.weight")])
    assert model.net[4].weight.min() == 0
    assert fit().net[4].weight.min() < 0
    assert model.net[0].weight.min() < 0


@pytest.mark.parametrize("callback", [MaxNorm(0.4), UnitNorm(), MinMaxNorm(0.8, 0.9)])
def test_norm_constraints_hold_after_each_step(callback):
    class Checked(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            norms = torch.cat([self.net[i].weight.norm(dim=1) for i in (0, 4)])
            assert norms.min() >= callback.interval()[0] - 1e-6
            assert norms.max() <= callback.interval()[1] + 1e-6

    fit([callback], Checked())
    with pytest.raises(AssertionError):
        fit(model=Checked())


def test_non_negative_works_with_unit_norm():
    """In either list order: the sign constraint acts first, since it would change the norm."""
    for callbacks in ([NonNegative(), UnitNorm()], [UnitNorm(), NonNegative()]):
        w = fit(callbacks).net[4].weight
        assert w.min() == 0
        assert_close(w.norm(dim=1), torch.ones(10))


def test_constrained_fraction_is_logged():
    memory = Memory()
    callbacks = [MaxNorm(1e-3), MinMaxNorm(0.0, 100.0), NonNegative(params="net.4.weight"), UnitNorm(params="net.0.weight")]
    negative = (Classifier().net[4].weight < 0).float().mean().item()
    fit(callbacks, Classifier(lr=0.0), max_epochs=1, logger=memory, log_every_n_steps=1)
    logged = {key.split("/")[1]: value for key, value in memory.steps[0].items() if key.endswith("constrained")}
    assert logged == {
        "MaxNorm": 1.0,
        "MinMaxNorm": 0.0,
        "NonNegative-net_4_weight": pytest.approx(negative),
        "UnitNorm-net_0_weight": 1.0,
    }


def test_constrained_fraction_per_optimizer():
    memory, model = Memory(), Gan()
    model.net[0].weight.data.mul_(100)
    fit([MaxNorm(2.0), WeightClipping(1e9)], model, logger=memory, log_every_n_steps=1, max_epochs=1)
    logged = memory.steps[0]
    assert logged["reg/MaxNorm/constrained_0"] == 1
    assert logged["reg/MaxNorm/constrained_1"] == 0
    assert logged["reg/WeightClipping/constrained_0"] == logged["reg/WeightClipping/constrained_1"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxNorm(0.0), r"MaxNorm: max_norm must be a number in \(0, inf\], got 0.0"),
        (lambda: MinMaxNorm(-1, 2.0), r"MinMaxNorm: min_norm must be a number in \[0, inf\), got -1"),
        (lambda: MinMaxNorm(2.0, 1.0), "min_norm must be at most max_norm, got min_norm=2 and max_norm=1"),
        (lambda: MinMaxNorm(1.0, 2.0, rate=1.5), r"MinMaxNorm: rate must be a number in \[0, 1\], got 1.5"),
        (
            lambda: fit([MinMaxNorm(Linear(0.0, 2.0), 1.0)]),
            "min_norm must be at most max_norm, got min_norm=1.25 and max_norm=1",
        ),
    ],
    ids=["bound of 0", "negative lower bound", "lower bound above upper", "rate above 1", "scheduled lower bound above upper"],
)
def test_invalid_norm_bounds_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
