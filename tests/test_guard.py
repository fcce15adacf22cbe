"""Steps with non-finite gradients: skipped as if they had never happened, repaired, or an error."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Classifier, Memory, digits, fit, same, weights
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_reg import (
    GradientNormClipping,
    L2Penalty,
    Linear,
    NonFiniteGradientGuard,
    QuantileGradientClipping,
    RandomShrinkage,
    SoftThresholding,
    WeightClipping,
    WeightDecay,
    ZScoreGradientClipping,
)
from lightning_reg.functional import nonfinite_gradients, zero_nonfinite_gradients_

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.001, momentum=0.5),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*acts on parameters that the optimizer also decays"),
    pytest.mark.filterwarnings("ignore:NonFiniteGradientGuard.*infinite or NaN gradients at step"),  # see test_skipped_steps
]


class Poisoned(Classifier):
    """The model without dropout. The third entry of each batch is a factor of the loss."""

    def __init__(self, optimizer="SGD"):
        super().__init__()
        self.net[3].p = 0.0
        self.make = OPTIMIZERS[optimizer]

    def training_step(self, batch, batch_idx):
        images, labels, factor = batch
        return super().training_step((images[0], labels[0]), batch_idx) * factor[0]

    def configure_optimizers(self):
        self.optimizer = self.make(self.parameters())
        return self.optimizer


def batches(*factors):
    """Return one batch of digits per factor; ``None`` leaves the batch out."""
    images, labels = digits(16 * len(factors))
    parts = zip(images.split(16), labels.split(16), factors, strict=True)
    return DataLoader([(x, y, torch.tensor(factor)) for x, y, factor in parts if factor is not None])


def others():
    """Return callbacks that would act on a bad step: on the loss, gradients, weights, and statistics."""
    return [
        L2Penalty(0.1, inject="gradient"),
        L2Penalty(0.1, params="net.0.weight", name="on the loss", inject="loss"),
        QuantileGradientClipping(0.5),
        ZScoreGradientClipping(1.0, warmup=2),
        GradientNormClipping(1.0),
        WeightDecay(0.1),
        SoftThresholding(0.01),
        WeightClipping(0.3),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_step_equals_run_without_batch(optimizer, bad):
    skipping, without = Poisoned(optimizer), Poisoned(optimizer)
    fit([NonFiniteGradientGuard(), *others()], skipping, batches(1.0, 1.0, 1.0, bad, 1.0, 1.0), max_epochs=1)
    fit(others(), without, batches(1.0, 1.0, 1.0, None, 1.0, 1.0), max_epochs=1)
    assert same(skipping, without)
    states = [model.optimizer.state_dict()["state"] for model in (skipping, without)]
    assert_close(states[0], states[1], rtol=0.0, atol=0.0)
    unguarded = fit(others(), Poisoned(optimizer), batches(1.0, 1.0, 1.0, bad, 1.0, 1.0), max_epochs=1)
    assert not same(unguarded, without)


def test_random_shrinkage_ignores_skipped_step():
    """A separate test, since its random numbers depend on the step number, which Lightning still increases."""
    factors = [1.0, 1.0, math.nan]
    skipped = fit([NonFiniteGradientGuard(), RandomShrinkage(0.1)], Poisoned(), batches(*factors), max_epochs=1)
    assert same(skipped, fit([RandomShrinkage(0.1)], Poisoned(), batches(1.0, 1.0, None), max_epochs=1))


def test_guard_checks_only_selected_parameters():
    class OneBadLayer(Poisoned):
        def on_before_backward(self, loss):
            self.net[4].bias.register_hook(lambda grad: grad * math.nan)

    guarded = fit([NonFiniteGradientGuard(params="net.0.*")], OneBadLayer(), batches(1.0, 1.0), max_epochs=1)
    assert guarded.net[4].bias.isnan().all()  # not selected
    guarded = fit([NonFiniteGradientGuard()], OneBadLayer(), batches(1.0, 1.0), max_epochs=1)
    assert same(guarded, OneBadLayer())


def test_accumulated_step_is_bad_if_any_batch_is():
    model = Poisoned()
    fit([NonFiniteGradientGuard()], model, batches(1.0, 1.0, 1.0, math.nan), max_epochs=1, accumulate_grad_batches=2)
    first = fit(model=Poisoned(), data=batches(1.0, 1.0), max_epochs=1, accumulate_grad_batches=2)
    assert same(model, first)


def test_zero_policy_zeros_bad_entries():
    class OneBadEntry(Poisoned):
        def on_before_backward(self, loss):
            bad = torch.ones(16, 64)
            bad[2, 20] = self.factor
            self.net[0].weight.register_hook(lambda grad: grad * bad)

    def run(factor, callbacks):
        model = OneBadEntry()
        model.factor = factor
        return fit(callbacks, model, batches(1.0), max_epochs=1)

    repaired, zero = run(math.nan, [NonFiniteGradientGuard("zero")]), run(0.0, [])
    assert same(repaired, zero)
    assert not same(repaired, run(1.0, []))
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([math.nan, math.inf, -math.inf, 5.0])
    zero_nonfinite_gradients_([p])
    assert p.grad.tolist() == [0, 0, 0, 5]


def test_raise_policy_names_parameters():
    class OneBadLayer(Poisoned):
        def on_before_backward(self, loss):
            self.net[4].bias.register_hook(lambda grad: grad * math.nan)

    message = (
        "NonFiniteGradientGuard: infinite or NaN gradients at step 0 in net.4.bias: look for bad data, .* or "
        "lower the learning rate"
    )
    with pytest.raises(RuntimeError, match=message):
        fit([NonFiniteGradientGuard("raise")], OneBadLayer(), batches(1.0))


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_patience_raises_after_consecutive_bad_steps(policy):
    bad = math.nan
    guard = lambda: NonFiniteGradientGuard(policy, patience=3)  # noqa: E731
    fit([guard()], Poisoned(), batches(bad, bad, 1.0, bad, bad, 1.0), max_epochs=1)
    with pytest.raises(RuntimeError, match=r"NaN gradients at step 3 \(3 steps in a row\) in net.0.weight, net.0.bias, "):
        fit([guard()], Poisoned(), batches(1.0, bad, bad, bad), max_epochs=1)


def test_bad_step_counts_are_logged_and_saved():
    memory, guard = Memory(), NonFiniteGradientGuard()
    fit([guard], Poisoned(), batches(1.0, math.nan, 1.0, math.nan), max_epochs=1, logger=memory, log_every_n_steps=1)
    assert [metrics["reg/NonFiniteGradientGuard/nonfinite_steps"] for metrics in memory.steps.values()] == [0, 1, 1, 2]
    state, loaded = guard.state_dict(), NonFiniteGradientGuard()
    loaded.load_state_dict(state)
    assert loaded.state["consecutive"] == {0: 1}
    assert dict(loaded.running.compute_and_reset())["nonfinite_steps"] == 2


def fit_scaled(callbacks, factors, scale, enabled=True):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
    model, plugins = Poisoned(), [MixedPrecision("16-mixed", "cpu", scaler)]
    fit(callbacks, model, batches(*factors), max_epochs=1, plugins=plugins, logger=Memory(), log_every_n_steps=1)
    return model, scaler.get_scale()


@pytest.mark.parametrize("policy", ["skip", "zero", "raise"])
def test_guard_does_not_change_loss_scaling(policy):
    """At a scale of 2^24, float16 gradients overflow until the scaler has halved it often enough."""
    factors, scale = [1.0] * 16, 2.0**24
    (guarded, guarded_scale), (plain, plain_scale) = (
        fit_scaled([NonFiniteGradientGuard(policy, patience=1)], factors, scale),
        fit_scaled([], factors, scale),
    )
    assert guarded_scale == plain_scale < scale / 2
    assert same(guarded, plain)
    assert not same(guarded, Poisoned())


def test_no_technique_acts_on_step_skipped_by_scaler():
    bad = [1.0, math.nan, 1.0]
    guarded, unguarded = others(), others()
    (first, _), (second, _) = (
        fit_scaled([NonFiniteGradientGuard(), *guarded], bad, 1024.0),
        fit_scaled(others(), [1.0, None, 1.0], 1024.0),
    )
    assert_close(weights(first), weights(second), rtol=1e-5, atol=1e-6)
    fit_scaled(unguarded, bad, 1024.0)
    counts = [dict(callbacks[2].running.compute_and_reset())["nonfinite_steps"] for callbacks in (guarded, unguarded)]
    assert counts == [0, 1]  # bad steps that the statistics saw


def test_bad_steps_count_when_scale_falls_below_one():
    with pytest.raises(RuntimeError, match=r"NaN gradients at step 3 \(3 steps in a row\)"):
        fit_scaled([NonFiniteGradientGuard(patience=3)], [math.nan] * 6, scale=1.0)


def test_bad_steps_count_when_scaler_is_disabled():
    with pytest.raises(RuntimeError, match="NaN gradients at step 1"):
        fit_scaled([NonFiniteGradientGuard("raise")], [1.0, math.nan], scale=1024.0, enabled=False)


def test_skipping_with_trainer_value_clipping_raises():
    options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value", "max_epochs": 1}
    with pytest.raises(
        ValueError, match=r"gradient_clip_algorithm='value'\) fails without gradients: use GradientValueClipping"
    ):
        fit([NonFiniteGradientGuard()], Poisoned(), batches(1.0), **options)
    fit([NonFiniteGradientGuard("zero")], Poisoned(), batches(1.0, math.nan), **options)


def test_skipping_lbfgs_raises():
    class Searches(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    fit([NonFiniteGradientGuard()], Searches(), max_epochs=1)


def test_nonfinite_gradients_of_each_tensor():
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(2,), (0, 3), (), (4,), (2,)]]
    for p, value in zip(params[:4], [1.0, 0.0, math.inf, math.nan], strict=True):
        p.grad = torch.full_like(p, value)
    assert nonfinite_gradients(params).tolist() == [False, False, True, True, False]
    assert nonfinite_gradients([]).tolist() == []


def test_nonfinite_gradients_of_sparse_tensor():
    layer = nn.Embedding(4, 2, sparse=True)
    (layer(torch.tensor([1, 1])) * math.inf).sum().backward()
    assert nonfinite_gradients([layer.weight]).tolist() == [True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonFiniteGradientGuard("ignore"), "policy must be 'skip', 'zero' or 'raise', got 'ignore'"),
        (lambda: NonFiniteGradientGuard(patience=0), "NonFiniteGradientGuard: patience must be an integer ≥ 1, got 0"),
    ],
    ids=["unknown policy", "patience of 0"],
)
def test_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule_advances_over_skipped_step():
    """Progress counts batches, so a skipped step does not delay the schedule."""
    seen = []

    class RecordedPenalty(L2Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit(
        [NonFiniteGradientGuard(), RecordedPenalty(Linear(0.0, 1.0), inject="gradient")],
        Poisoned(),
        batches(1.0, math.nan, 1.0, 1.0),
        1,
    )
    assert seen == pytest.approx([0.0, 0.5, 0.75])
