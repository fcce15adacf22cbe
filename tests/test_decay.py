from __future__ import annotations

import pytest
import torch
from helpers import Classifier, Fused, fit, same, weights
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close

from lightning_reg import GroupSoftThresholding, Linear, SoftThresholding, WeightDecay, WeightDecayScheduler, decay_groups
from lightning_reg.functional import Units, group_soft_threshold_, soft_threshold_
from lightning_reg.shrinkage import proximal


class Adam(Classifier):
    """The model with AdamW, whose weight decay may be 0. One layer has no gradient."""

    def __init__(self, decay=0.0, params="all"):
        super().__init__()
        self.decay, self.params = decay, params
        self.unused = nn.Linear(3, 3)
        nn.init.constant_(self.unused.weight, 1.0)
        nn.init.constant_(self.unused.bias, 1.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(decay_groups(self, self.decay, params=self.params), lr=0.01, weight_decay=0.0)


@pytest.mark.parametrize("params", ["all", "weights"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weight_decay_equals_adamw(params, accumulate):
    """Bit-identical, also for parameters without a gradient, which AdamW skips."""
    ours = fit([WeightDecay(0.1, params=params)], Adam(), accumulate_grad_batches=accumulate)
    assert same(ours, fit(model=Adam(0.1, params), accumulate_grad_batches=accumulate))
    assert not same(ours, fit(model=Adam(), accumulate_grad_batches=accumulate))
    assert torch.equal(ours.unused.weight, torch.ones(3, 3))


class Overflows(Adam):
    """A model whose first step the loss scaler skips."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 0 else 1.0)


def test_weight_decay_equals_adamw_under_loss_scaling():
    """Bit-identical, and a step that the scaler skips does not decay."""

    def fit_scaled(callbacks, model, batches):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
        return fit(callbacks, model, plugins=[precision], max_epochs=1, limit_train_batches=batches)

    ours = fit_scaled([WeightDecay(0.1, params="all")], Overflows(), 4)
    assert same(ours, fit_scaled([], Overflows(0.1), 4))
    assert not same(ours, fit_scaled([], Overflows(), 4))
    assert same(fit_scaled([WeightDecay(0.1, params="all")], Overflows(), 1), Overflows())


class Groups(Classifier):
    """Two parameter groups with separate learning rates, and a loss with zero gradients."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.net[0].parameters(), "lr": 0.0}, {"params": self.net[4].parameters()}], lr=0.1)


@pytest.mark.parametrize("callback", [WeightDecay(0.5), SoftThresholding(0.1), GroupSoftThresholding(0.1)])
def test_decay_uses_learning_rate_of_group(callback):
    model = fit([callback], Groups(), max_steps=1)
    assert torch.equal(model.net[0].weight, Groups().net[0].weight)
    assert not torch.equal(model.net[4].weight, Groups().net[4].weight)


def test_one_step_matches_formula():
    start = Groups().net[4].weight
    assert_close(fit([WeightDecay(0.5)], Groups(), max_steps=1).net[4].weight, start * 0.95)
    thresholded = start.sign() * (start.abs() - 0.01).clamp(min=0)
    assert_close(fit([SoftThresholding(0.1)], Groups(), max_steps=1).net[4].weight, thresholded)


def test_decay_groups_split_trainable_parameters():
    model = Classifier()
    model.net[4].requires_grad_(False)
    decayed, others = decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.net[0].weight)]
    assert [id(p) for p in others["params"]] == [id(p) for p in (model.net[0].bias, *model.net[1].parameters())]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    with pytest.raises(ValueError, match=r"decay_groups: weight_decay must be a number in \[0, inf\), got -0.1"):
        decay_groups(model, -0.1)
    with pytest.raises(ValueError, match="no parameter has a name that matches 'nett"):
        decay_groups(model, 0.1, params="nett.*")


def test_scheduler_sets_decay_of_decaying_groups():
    class Recorder(Adam):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), [group["weight_decay"] for group in self.optimizers().param_groups]]

    model = Recorder(0.1, "weights")
    fit([WeightDecayScheduler(Linear(0.0, 0.8))], model, max_epochs=1)
    assert_close(model.seen, [[0.0, 0.0], [0.2, 0.0], [0.4, 0.0], [0.6, 0.0]])
    assert same(fit([WeightDecayScheduler(0.3)], Adam(0.1, "weights")), fit(model=Adam(0.3, "weights")))


def test_scheduler_without_decaying_group_raises():
    with pytest.raises(
        ValueError, match=r"WeightDecayScheduler: no parameter group has a nonzero weight_decay .* use WeightDecay"
    ):
        fit([WeightDecayScheduler(0.1)])


def test_decay_in_addition_to_optimizer_warns():
    with pytest.warns(UserWarning, match=r"WeightDecay acts on parameters that the optimizer also decays \(weight_decay=0.1\)"):
        fit([WeightDecay(0.1)], Classifier(weight_decay=0.1))


def test_fused_optimizer_under_loss_scaling_raises():
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="WeightDecay acts before the optimizer step, but the fused Adam"):
        fit([WeightDecay(0.1)], Fused(), plugins=[precision])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_threshold_minimizes_objective(dtype):
    """The proximal map matches a grid search, has exact zeros, and is the identity at strength 0."""
    w = torch.linspace(-2, 2, 41).to(dtype)
    result = w.clone()
    soft_threshold_([result], 0.5)
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    objective = (grid - w.double().unsqueeze(1)).square() / 2 + 0.5 * grid.abs()
    assert_close(result.double(), grid[objective.argmin(1)], rtol=0.0, atol=1e-3 if dtype == torch.float32 else 1e-2)
    assert (result == 0).sum() == (w.abs() <= 0.5).sum()
    unchanged = w.clone()
    soft_threshold_([unchanged], 0.0)
    assert torch.equal(unchanged, w)


def test_group_soft_threshold_keeps_units_with_overflowing_norms():
    w = torch.tensor([[2e19, 2e19], [0.0, 0.0]])
    group_soft_threshold_([w], 0.1)
    assert w.tolist() == torch.tensor([[2e19, 2e19], [0.0, 0.0]]).tolist()


def test_group_soft_threshold_minimizes_objective():
    torch.manual_seed(0)
    w = torch.randn(5, 4, dtype=torch.float64)
    w[2] = 0.0
    result = w.clone()
    group_soft_threshold_([result], 0.8)
    for before, after in zip(w, result, strict=True):
        if after.norm() > 0:  # the gradient of the objective is zero at the minimum
            assert_close(after - before + 0.8 * 2 * after / after.norm(), torch.zeros(4, dtype=torch.float64))
        else:
            assert before.norm() <= 0.8 * 2
    assert 1 < (result == 0).all(1).sum() < 5
    columns = w.t().clone()
    group_soft_threshold_([columns], 0.8, [Units(1)])
    assert_close(columns.t(), result)
    unchanged = w.clone()
    group_soft_threshold_([unchanged], 0.0)
    assert torch.equal(unchanged, w)


@pytest.mark.parametrize("callback", [SoftThresholding(0.3), GroupSoftThresholding(0.2)])
def test_thresholding_gives_exact_zeros(callback):
    sparse, dense = fit([callback], max_epochs=4), fit(max_epochs=4)
    zeros = (sparse.net[0].weight == 0).all(1) if isinstance(callback, GroupSoftThresholding) else sparse.net[0].weight == 0
    assert zeros.float().mean() > 0.2
    assert not (dense.net[0].weight == 0).any()
    assert weights(sparse)["net.0.bias"].count_nonzero() > 0


@pytest.mark.parametrize("kind", [WeightDecay, WeightDecayScheduler, SoftThresholding, GroupSoftThresholding])
def test_strength_out_of_range_raises(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: (strength|weight_decay) must be a number in \[0, inf\), got -0.1"):
        kind(-0.1)


# Learning rates that are tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.3, 1.7, 9.0])
def test_threshold_as_tensor_equals_number(dtype, threshold):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(6, 50), torch.zeros(1, 50), torch.full((1, 50), threshold), torch.full((1, 50), 1e-30)])
    values = values.to(dtype)
    for function, tolerance in (
        (soft_threshold_, {"rtol": 0, "atol": 0}),
        (group_soft_threshold_, {"rtol": 1e-2, "atol": 1e-4}),
    ):
        by_number, by_tensor = values.clone(), values.clone()
        function(by_number, threshold)
        function(by_tensor, torch.tensor(threshold, dtype=torch.float64))
        assert_close(by_tensor, by_number, **tolerance)


def test_threshold_as_tensor_keeps_infinite_and_nan_weights():
    values = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [-torch.inf, -1.0]])
    for function in (soft_threshold_, group_soft_threshold_):
        by_number, by_tensor = values.clone(), values.clone()
        function(by_number, 0.5)
        function(by_tensor, torch.tensor(0.5))
        assert_close(by_tensor, by_number, rtol=0, atol=0, equal_nan=True)


class TensorRate(Classifier):
    """The model with a learning rate that is a tensor, as graph capture needs it, and falls."""

    def __init__(self, as_tensor=True):
        super().__init__()
        self.rate = torch.tensor(0.05) if as_tensor else torch.tensor(0.05).item()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.parametrize("callback", [SoftThresholding, GroupSoftThresholding, WeightDecay])
@pytest.mark.parametrize("on_device", [False, True])
def test_learning_rate_as_tensor_equals_number(callback, on_device, monkeypatch):
    expected = fit([callback(0.02)], TensorRate(as_tensor=False))
    monkeypatch.setattr(proximal, "is_cpu", lambda tensor: not on_device)
    assert_close(weights(fit([callback(0.02)], TensorRate())), weights(expected), rtol=1e-6, atol=1e-7)
    with pytest.raises(AssertionError):
        assert_close(weights(fit(model=TensorRate())), weights(expected))
