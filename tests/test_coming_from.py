"""What ``docs/coming-from.md`` calls the same is the same: both sides train, and their weights are compared."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, distance, fit, parameter, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning

from lightning_reg import (
    ElasticNetPenalty,
    GradientNormClipping,
    GradientValueClipping,
    L1Penalty,
    L2Penalty,
    WeightClipping,
    WeightDecay,
    WeightPruning,
    decay_groups,
)
from lightning_reg.functional import project_unit_norms_


def matrices(module):
    """Return the weights of the linear layers, which ``"weights"`` selects."""
    return [p for name, p in module.named_parameters() if p.ndim > 1]


class Optimized(Classifier):
    """Trains with an optimizer that a function makes."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


def adamw(module):
    return torch.optim.AdamW(decay_groups(module, 0.1), lr=0.01)


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def decayed_sgd(module):
    return torch.optim.SGD(decay_groups(module, 0.01), lr=0.05)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05)


class ByHand(Classifier):
    """Adds a penalty in ``training_step``."""

    def __init__(self, penalty):
        super().__init__()
        self.penalty = penalty

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.penalty(matrices(self))


def l1(params):
    return 1e-2 * sum(p.abs().sum() for p in params)


def l2(params):
    return 1e-2 * sum(p.pow(2).sum() for p in params)


class Clamp(Callback):
    """Clamps the weights by hand after each step."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        for p in matrices(pl_module):
            p.data.clamp_(-0.05, 0.05)


EXACT = {
    "gradient_clip_val": (
        lambda: fit(gradient_clip_val=0.1),
        lambda: fit([GradientNormClipping(0.1)]),
    ),
    "gradient_clip_algorithm": (
        lambda: fit(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
        lambda: fit([GradientValueClipping(0.01)]),
    ),
    "AdamW": (
        lambda: fit(model=Optimized(adamw)),
        lambda: fit([WeightDecay(0.1)], Optimized(adam)),
    ),
    "SGD(weight_decay)": (
        lambda: fit(model=Optimized(decayed_sgd)),
        lambda: fit([L2Penalty(0.01, inject="gradient")], Optimized(sgd)),
    ),
    "clamp_": (
        lambda: fit([Clamp()]),
        lambda: fit([WeightClipping(0.05)]),
    ),
}
"""Pairs of fits whose weights are bit-identical, by what the first of them uses."""

CLOSE = {
    "L1 by hand": (lambda: fit(model=ByHand(l1)), lambda: fit([L1Penalty(1e-2)])),
    "L2 by hand": (lambda: fit(model=ByHand(l2)), lambda: fit([L2Penalty(2e-2)])),
    "L1L2 by hand": (
        lambda: fit(model=ByHand(lambda params: l1(params) + l2(params))),
        lambda: fit([ElasticNetPenalty(l1=1e-2, l2=2e-2)]),
    ),
}
"""Pairs that are equal up to rounding."""


@pytest.mark.parametrize("name", EXACT)
def test_same_bits(name):
    there, here = EXACT[name]
    trained = here()
    assert same(there(), trained)
    assert distance(fit(), trained) > 1e-2, "the technique does something"


@pytest.mark.parametrize("name", CLOSE)
def test_same_up_to_rounding(name):
    there, here = CLOSE[name]
    trained = here()
    assert distance(there(), trained) < 1e-4
    assert distance(fit(), trained) > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rewinds", [False, True])
def test_model_pruning_of_one_epoch(rewinds):
    """Rewinding is its default."""
    model = Classifier()
    layers = [(layer, "weight") for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    options = {"use_global_unstructured": True, "use_lottery_ticket_hypothesis": rewinds}
    there = fit([ModelPruning("l1_unstructured", parameters_to_prune=layers, amount=0.5, **options)], model, max_epochs=1)
    here = fit([WeightPruning(0.5, min_kept=0.0, rewind_to_step=0 if rewinds else None)], max_epochs=1)
    for one, other in zip(matrices(there), matrices(here), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert sum((p == 0).sum() for p in matrices(here)) == sum(p.numel() for p in matrices(here)) // 2


def test_decay_of_composer():
    """Its ``DecoupledAdamW`` multiplies by 1 − w · lr/initial_lr in front of the update."""
    w, lr, steps = 1e-2, 0.05, 3
    p = parameter([1.0, -2.0])
    optimizer = torch.optim.Adam([p], lr=lr)
    module = torch.nn.ParameterDict({"weight": p})
    other = parameter([1.0, -2.0])
    decayed = torch.optim.AdamW([other], lr=lr, weight_decay=w / lr)
    for step in range(steps):
        for group in (*optimizer.param_groups, *decayed.param_groups):
            group["lr"] = lr / (1 + step)
        p.grad, other.grad = torch.ones(2), torch.ones(2)
        p.data.mul_(1 - optimizer.param_groups[0]["lr"] / lr * w)
        optimizer.step()
        decayed.step()
    torch.testing.assert_close(module["weight"], other)


def test_max_norm_of_keras():
    """In Keras, a dense layer has its outputs in the last dimension: w · clip(norm, 0, c) / (ε + norm) along axis 0."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3
    kernel = weight.T
    norms = kernel.square().sum(0, keepdim=True).sqrt()
    expected = kernel * norms.clamp(0, 2.0) / (1e-7 + norms)
    project_unit_norms_([weight], 0.0, 2.0)
    torch.testing.assert_close(weight.T, expected)
