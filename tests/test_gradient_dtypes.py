"""Gradients in another dtype than their parameters, as ``grad_dtype`` asks for."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit
from laws import changed
from table import ROWS
from torch import nn
from torch.testing import assert_close

from lightning_reg import OrthogonalityPenalty, Penalty, functional

CREATING = {
    "add_l1_gradient_": lambda p: functional.add_l1_gradient_([p], 0.01),
    "add_l2_gradient_": lambda p: functional.add_l2_gradient_([p], 0.01),
    "add_group_lasso_gradient_": lambda p: functional.add_group_lasso_gradient_([p], 0.01),
    "add_distance_gradient_": lambda p: functional.add_distance_gradient_([p], [torch.zeros_like(p)], 0.01),
    "add_gradient_": lambda p: OrthogonalityPenalty(1.0).add_gradient_([p], 0.01),
}


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("name", CREATING)
def test_missing_gradient_is_created_in_grad_dtype(name, has_gradient):
    """Gradients in float32 of weights in bfloat16 are those of the same weights in float32."""
    half = nn.Parameter(torch.linspace(-1.0, 2.0, 12).view(3, 4).bfloat16())
    half.grad_dtype = torch.float32
    full = nn.Parameter(half.detach().float())
    for p in (half, full):
        p.grad = torch.full((3, 4), 1e-3) if has_gradient else None
        CREATING[name](p)
    assert half.grad.dtype == torch.float32
    by_autograd = name == "add_gradient_"  # which rounds in between
    assert_close(half.grad, full.grad, **({"rtol": 1e-2, "atol": 1e-4} if by_autograd else {"rtol": 1e-6, "atol": 1e-9}))
    plain = nn.Parameter(half.detach())
    CREATING[name](plain)
    assert plain.grad.dtype == torch.bfloat16


def test_every_function_that_creates_gradients_has_a_row():
    functions = {name for name in vars(functional) if name.startswith("add_")}
    assert functions - {"add_gradient_noise_"} == {*CREATING} - {"add_gradient_"}


class WideGradients(Classifier):
    """bfloat16 weights with gradients in float32, as an optimizer with float32 state wants them. One layer has no gradient."""

    def __init__(self, **options):
        super().__init__(**options)
        self.unused = nn.Linear(3, 3)
        self.bfloat16()
        for p in self.parameters():
            p.grad_dtype = torch.float32

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0].bfloat16()).float(), batch[1])

    def configure_optimizers(self):
        return InFloat32(self.parameters(), {"lr": 0.05})


class InFloat32(torch.optim.Optimizer):
    """Plain gradient descent that needs gradients in float32."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                assert p.grad.dtype == torch.float32
                p.copy_(p - 0.05 * p.grad)
        return loss


@pytest.mark.parametrize("inject", ["loss", "gradient"])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if isinstance(row.active(), Penalty)])
def test_fit_with_gradients_in_float32(name, inject):
    trained, plain = (
        fit(callbacks, WideGradients(), max_epochs=1) for callbacks in ([changed(ROWS[name].active(), inject=inject)], [])
    )
    assert not torch.equal(trained.net[0].weight, plain.net[0].weight)
    assert trained.unused.weight.grad is None or trained.unused.weight.grad.dtype == torch.float32
