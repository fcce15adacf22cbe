"""A linear model trained with a Trainer, compared with scikit-learn's solvers on the same objective.

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
    """Half the mean squared error of a linear map, minimized by gradient descent on all samples.

    Args:
        lr: The initial learning rate. It must stay below 2 over the largest eigenvalue, which is 4.
        end: The final learning rate, reached over the second half of training.
        steps: The number of steps.
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
        decay = Exponential(1.0, self.end / self.lr, begin=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / self.steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def coefficients(callbacks, steps, **model):
    """Train for a number of steps and return the coefficients."""
    trained = fit(callbacks, LinearModel(steps=steps, **model), DATA, max_epochs=steps, precision="64-true")
    return trained.linear.weight.detach().numpy()[0]


def error(result, solver):
    """Return the relative distance of coefficients from a solver's coefficients."""
    truth = solver.fit(X, Y).coef_
    return np.linalg.norm(result - truth) / np.linalg.norm(truth)


RIDGE = Ridge(alpha=ALPHA * len(X), fit_intercept=False, tol=1e-12)
LASSO = Lasso(alpha=ALPHA, fit_intercept=False, tol=1e-12, max_iter=100_000)
NET = ElasticNet(alpha=ALPHA, l1_ratio=RATIO, fit_intercept=False, tol=1e-12, max_iter=100_000)
SUBGRADIENT = {"lr": 0.4, "end": 3e-4}  # subgradient steps oscillate around zero, so the learning rate must vanish


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_ridge(route):
    assert error(coefficients([L2Penalty(ALPHA, inject=route)], 600), RIDGE) < 1e-3
    assert error(coefficients([L2Penalty(2 * ALPHA, inject=route)], 600), RIDGE) > 1e-2


def test_lasso_by_proximal_steps():
    result = coefficients([SoftThresholding(ALPHA)], 600)
    assert error(result, LASSO) < 1e-3
    assert (result == 0).tolist() == (LASSO.coef_ == 0).tolist()
    assert 0 < (result == 0).sum() < 10


def test_elastic_net_by_proximal_steps():
    result = coefficients([SoftThresholding(ALPHA * RATIO), L2Penalty(ALPHA * (1 - RATIO))], 600)
    assert error(result, NET) < 1e-3
    assert (result == 0).tolist() == (NET.coef_ == 0).tolist()
    assert 0 < (result == 0).sum() < 10


@pytest.mark.parametrize("route", ["loss", "gradient"])
def test_lasso_by_subgradients(route):
    """As close, but without exact zeros."""
    result = coefficients([L1Penalty(ALPHA, inject=route)], 2500, **SUBGRADIENT)
    assert error(result, LASSO) < 1e-3
    assert not (result == 0).any()


def test_elastic_net_by_subgradients():
    penalty = ElasticNetPenalty(ALPHA * RATIO, ALPHA * (1 - RATIO))
    assert error(coefficients([penalty], 2500, **SUBGRADIENT), NET) < 1e-3


def test_scheduled_strength_reaches_solution_of_final_value():
    """From a strong penalty to a weak one, like the path of a solver."""
    assert error(coefficients([SoftThresholding(Exponential(1.0, ALPHA, until=0.3))], 900), LASSO) < 1e-3
