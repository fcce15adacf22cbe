"""A linear model trained through a Trainer against scikit-learn's solvers, on the same objective.

scikit-learn minimizes, over n samples with centered columns and targets:

- Ridge(alpha):                ||y - Xw||² + alpha ||w||²
- Lasso(alpha):                ||y - Xw||² / (2n) + alpha ||w||₁
- ElasticNet(alpha, l1_ratio): ||y - Xw||² / (2n) + alpha l1_ratio ||w||₁ + alpha (1 - l1_ratio) ||w||² / 2

The module's loss is half the mean squared error, ||y - Xw||² / (2n), so Ridge's alpha is n times the strength of L2Penalty.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import fit
from lightning.pytorch import LightningModule
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import ElasticNetPenalty, Exponential, L1Penalty, L2Penalty, SoftThresholding

X, Y = load_diabetes(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
Y = (Y - Y.mean()) / Y.std()
DATA = DataLoader([(torch.tensor(X), torch.tensor(Y))], batch_size=None)  # one batch, collated once
ALPHA, RATIO = 0.1, 0.5


class LinearModel(LightningModule):
    """Half the mean squared error of a linear map, by gradient descent on all samples.

    Args:
        lr: The learning rate at first; it must stay below 2 over the largest eigenvalue, which is 4.
        end: The learning rate at last, to which it falls over the second half.
        steps: How many steps there are.
    """

    def __init__(self, lr: float = 0.4, end: float = 0.4, steps: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 1, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.lr, self.end, self.steps = lr, end, steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.linear(x).squeeze(1) - y).square().mean() / 2

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        fall = Exponential(1.0, self.end / self.lr, begin=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: fall(step / self.steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def coefficients(callbacks, steps, **model):
    """Train for a number of steps and return the coefficients."""
    trained = fit(callbacks, LinearModel(steps=steps, **model), DATA, max_epochs=steps, precision="64-true")
    return trained.linear.weight.detach().numpy()[0]


def error(found, solver):
    """Return the relative distance of coefficients from those of a solver."""
    truth = solver.fit(X, Y).coef_
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


RIDGE = Ridge(alpha=ALPHA * len(X), fit_intercept=False, tol=1e-12)
LASSO = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-12, max_iter=100_000)
NET = ElasticNet(alpha=ALPHA, l1_ratio=RATIO, fit_intercept=False, tol=1e-12, max_iter=100_000)
SUBGRADIENT = {"lr": 0.4, "end": 3e-4}  # the subgradient hovers within a step of zero, so the steps must vanish


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_ridge(route):
    assert error(coefficients([L2Penalty(ALPHA, inject=route)], 600), RIDGE) < 1e-3
    assert error(coefficients([L2Penalty(2 * ALPHA, inject=route)], 600), RIDGE) > 1e-2


def test_lasso_by_proximal_steps():
    found = coefficients([SoftThresholding(ALPHA)], 600)
    assert error(found, LASSO) < 1e-3
    assert (found == 0).tolist() == (LASSO.coef_ == 0).tolist()
    assert 0 < (found == 0).sum() < 10


def test_elastic_net_by_proximal_steps():
    found = coefficients([SoftThresholding(ALPHA * RATIO), L2Penalty(ALPHA * (1 - RATIO))], 600)
    assert error(found, NET) < 1e-3
    assert (found == 0).tolist() == (NET.coef_ == 0).tolist()
    assert 0 < (found == 0).sum() < 10


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_lasso_by_subgradients(route):
    """As near, but without a single exact zero."""
    found = coefficients([L1Penalty(ALPHA, inject=route)], 2500, **SUBGRADIENT)
    assert error(found, LASSO) < 1e-3
    assert not (found == 0).any()


def test_elastic_net_by_subgradients():
    penalty = ElasticNetPenalty(ALPHA * RATIO, ALPHA * (1 - RATIO))
    assert error(coefficients([penalty], 2500, **SUBGRADIENT), NET) < 1e-3


def test_a_scheduled_strength_ends_at_its_own_solution():
    """A path from a strong penalty to a weak one, as solvers take it."""
    assert error(coefficients([SoftThresholding(Exponential(1.0, ALPHA, until=0.3))], 900), LASSO) < 1e-3
