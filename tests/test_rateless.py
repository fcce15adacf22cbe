"""Every callback with an optimizer whose parameter groups have no learning rate."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Classifier, fit, weights
from table import every_callback, everything, model
from torch.testing import assert_close


class Rateless(torch.optim.Optimizer):
    """Gradient descent with a rate of 0.05, of which its groups say nothing."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.add_(p.grad, alpha=-0.05)
        return loss


class RatelessClassifier(Classifier):
    """The model with this optimizer."""

    def configure_optimizers(self):
        return Rateless(self.parameters())


def needs_rate(callback):
    return getattr(callback, "needs_learning_rate", False)


@every_callback
def test_a_rate_is_needed_only_where_it_is_used(row):
    for callback in (row.active(), *([row.scheduled()] if row.scheduled else [])):
        if type(callback).__name__ == "WeightDecayScheduler":
            with pytest.raises(ValueError, match="weight_decay"):
                fit([callback], RatelessClassifier(**row.options))
        elif needs_rate(callback):
            with pytest.raises(ValueError, match=r"but Rateless has no learning rate \(lr\): use "):
                fit([callback], RatelessClassifier(**row.options))
        else:
            expected = fit([copy.deepcopy(callback)], model(row, PlainClassifier))
            assert_close(weights(fit([callback], RatelessClassifier(**row.options))), weights(expected))


def test_all_other_callbacks_together():
    callbacks = [callback for callback in everything() if not needs_rate(callback)]
    expected = fit(copy.deepcopy(callbacks), PlainClassifier())
    assert_close(weights(fit(callbacks, RatelessClassifier())), weights(expected))


class PlainClassifier(Classifier):
    """The model with torch's optimizer for the same updates."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)
