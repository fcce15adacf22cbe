"""Steps whose gradients are not finite: skipped as if they had never been, mended, or an error."""

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


pytestmark = pytest.mark.filterwarnings("ignore:.*acts on parameters that the optimizer decays too")


class Poisoned(Classifier):
    """The model without dropout; batches whose third entry is not 1 have their loss multiplied by it."""

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
    """Return one batch of digits for each factor; ``None`` leaves the batch out."""
    images, labels = digits(16 * len(factors))
    parts = zip(images.split(16), labels.split(16), factors, strict=True)
    return DataLoader([(x, y, torch.tensor(factor)) for x, y, factor in parts if factor is not None])


def others():
    """Return callbacks that would act on a bad step: before the backward pass, on gradients, weights and statistics."""
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
def test_a_skipped_step_is_as_if_its_batch_had_never_come(optimizer, bad):
    skipping, without = Poisoned(optimizer), Poisoned(optimizer)
    fit([NonFiniteGradientGuard(), *others()], skipping, batches(1.0, 1.0, 1.0, bad, 1.0, 1.0), max_epochs=1)
    fit(others(), without, batches(1.0, 1.0, 1.0, None, 1.0, 1.0), max_epochs=1)
    assert same(skipping, without)
    states = [model.optimizer.state_dict()["state"] for model in (skipping, without)]
    assert_close(states[0], states[1], rtol=0.0, atol=0.0)
    unguarded = fit(others(), Poisoned(optimizer), batches(1.0, 1.0, 1.0, bad, 1.0, 1.0), max_epochs=1)
    assert not same(unguarded, without)


def test_random_shrinkage_leaves_a_skipped_step_alone():
    """Alone, since what it draws depends on the number of the step, which Lightning counts on."""
    last = [1.0, 1.0, math.nan]
    skipped = fit([NonFiniteGradientGuard(), RandomShrinkage(0.1)], Poisoned(), batches(*last), max_epochs=1)
    assert same(skipped, fit([RandomShrinkage(0.1)], Poisoned(), batches(1.0, 1.0, None), max_epochs=1))


def test_only_the_watched_parameters_count():
    class OneBadLayer(Poisoned):
        def on_before_backward(self, loss):
            self.net[4].bias.register_hook(lambda grad: grad * math.nan)

    guarded = fit([NonFiniteGradientGuard(params="net.0.*")], OneBadLayer(), batches(1.0, 1.0), max_epochs=1)
    assert guarded.net[4].bias.isnan().all()  # not watched
    guarded = fit([NonFiniteGradientGuard()], OneBadLayer(), batches(1.0, 1.0), max_epochs=1)
    assert same(guarded, OneBadLayer())


def test_an_accumulated_step_is_bad_if_one_of_its_batches_is():
    model = Poisoned()
    fit([NonFiniteGradientGuard()], model, batches(1.0, 1.0, 1.0, math.nan), max_epochs=1, accumulate_grad_batches=2)
    first = fit(model=Poisoned(), data=batches(1.0, 1.0), max_epochs=1, accumulate_grad_batches=2)
    assert same(model, first)


def test_bad_entries_are_set_to_zero():
    class OneBadEntry(Poisoned):
        def on_before_backward(self, loss):
            bad = torch.ones(16, 64)
            bad[2, 20] = self.factor
            self.net[0].weight.register_hook(lambda grad: grad * bad)

    def run(factor, callbacks):
        model = OneBadEntry()
        model.factor = factor
        return fit(callbacks, model, batches(1.0), max_epochs=1)

    mended, zero = run(math.nan, [NonFiniteGradientGuard("zero")]), run(0.0, [])
    assert same(mended, zero)
    assert not same(mended, run(1.0, []))
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([math.nan, math.inf, -math.inf, 5.0])
    zero_nonfinite_gradients_([p])
    assert p.grad.tolist() == [0, 0, 0, 5]


def test_an_error_names_the_parameters():
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
def test_patience_is_lost_after_bad_steps_in_a_row(policy):
    bad = math.nan
    guard = lambda: NonFiniteGradientGuard(policy, patience=3)  # noqa: E731
    fit([guard()], Poisoned(), batches(bad, bad, 1.0, bad, bad, 1.0), max_epochs=1)
    with pytest.raises(RuntimeError, match=r"NaN gradients at step 3 \(3 steps in a row\) in net.0.weight, net.0.bias, "):
        fit([guard()], Poisoned(), batches(1.0, bad, bad, bad), max_epochs=1)


def test_bad_steps_are_counted_for_the_logger_and_in_the_checkpoint():
    memory, guard = Memory(), NonFiniteGradientGuard()
    fit([guard], Poisoned(), batches(1.0, math.nan, 1.0, math.nan), max_epochs=1, logger=memory, log_every_n_steps=1)
    assert [metrics["reg/NonFiniteGradientGuard/nonfinite_steps"] for metrics in memory.steps.values()] == [0, 1, 1, 2]
    state, later = guard.state_dict(), NonFiniteGradientGuard()
    later.load_state_dict(state)
    assert later.state["consecutive"] == {0: 1}
    assert dict(later.running.compute_and_reset())["nonfinite_steps"] == 2


def scaled(callbacks, factors, scale, enabled=True):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
    model, plugins = Poisoned(), [MixedPrecision("16-mixed", "cpu", scaler)]
    fit(callbacks, model, batches(*factors), max_epochs=1, plugins=plugins, logger=Memory(), log_every_n_steps=1)
    return model, scaler.get_scale()


@pytest.mark.parametrize("policy", ["skip", "zero", "raise"])
def test_a_loss_scaler_searches_as_it_would_without_a_guard(policy):
    """With a scale of 2^24 float16 gradients overflow until the scaler has halved it often enough."""
    factors, scale = [1.0] * 16, 2.0**24
    (guarded, found), (plain, expected) = (
        scaled([NonFiniteGradientGuard(policy, patience=1)], factors, scale),
        scaled([], factors, scale),
    )
    assert found == expected < scale / 2
    assert same(guarded, plain)
    assert not same(guarded, Poisoned())


def test_nothing_acts_on_a_step_that_the_scaler_skips():
    bad = [1.0, math.nan, 1.0]
    guarded, unguarded = others(), others()
    (one, _), (other, _) = scaled([NonFiniteGradientGuard(), *guarded], bad, 1024.0), scaled(others(), [1.0, None, 1.0], 1024.0)
    assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)
    scaled(unguarded, bad, 1024.0)
    counts = [dict(callbacks[2].running.compute_and_reset())["nonfinite_steps"] for callbacks in (guarded, unguarded)]
    assert counts == [0, 1]  # what the statistics were shown


def test_a_scale_that_has_fallen_below_one_is_no_search():
    with pytest.raises(RuntimeError, match=r"NaN gradients at step 3 \(3 steps in a row\)"):
        scaled([NonFiniteGradientGuard(patience=3)], [math.nan] * 6, scale=1.0)


def test_a_scaler_that_is_switched_off_searches_nothing():
    with pytest.raises(RuntimeError, match="NaN gradients at step 1"):
        scaled([NonFiniteGradientGuard("raise")], [1.0, math.nan], scale=1024.0, enabled=False)


def test_value_clipping_by_the_trainer_is_refused_since_it_needs_gradients():
    options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value", "max_epochs": 1}
    with pytest.raises(
        ValueError, match=r"gradient_clip_algorithm='value'\) fails without gradients: use GradientValueClipping"
    ):
        fit([NonFiniteGradientGuard()], Poisoned(), batches(1.0), **options)
    fit([NonFiniteGradientGuard("zero")], Poisoned(), batches(1.0, math.nan), **options)


def test_lbfgs_cannot_be_skipped():
    class Searches(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    with pytest.raises(ValueError, match=r"cannot skip a step of LBFGS, which .* per step: use policy='raise' or 'zero'"):
        fit([NonFiniteGradientGuard()], Searches())
    fit([NonFiniteGradientGuard("raise")], Searches(), max_epochs=1)


def test_tensors_are_told_apart():
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(2,), (0, 3), (), (4,), (2,)]]
    for p, value in zip(params[:4], [1.0, 0.0, math.inf, math.nan], strict=True):
        p.grad = torch.full_like(p, value)
    assert nonfinite_gradients(params).tolist() == [False, False, True, True, False]
    assert nonfinite_gradients([]).tolist() == []


def test_sparse_gradients_are_watched_too():
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
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_goes_on_over_a_skipped_step():
    """Progress counts batches, so what comes after a skipped step is where it would have been."""
    seen = []

    class Watch(L2Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([NonFiniteGradientGuard(), Watch(Linear(0.0, 1.0), inject="gradient")], Poisoned(), batches(1.0, math.nan, 1.0, 1.0), 1)
    assert seen == pytest.approx([0.0, 0.5, 0.75])
