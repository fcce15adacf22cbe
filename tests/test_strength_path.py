"""Paths of strengths, against scikit-learn's cross-validation on a linear model, and the rule that chooses."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, LassoCV, Ridge
from sklearn.model_selection import KFold
from torch import nn
from torch.utils.data import DataLoader

from lightning_reg import DropoutInjection, L2Penalty, MaxNorm, SoftThresholding
from lightning_reg.tuning import strength_path
from lightning_reg.tuning.path import is_larger

X, Y = load_diabetes(return_X_y=True)
X, Y = (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()
FOLDS = list(KFold(5, shuffle=True, random_state=0).split(X))


class LinearModel(LightningModule):
    """Half the mean squared error, minimized by gradient descent on all samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def training_step(self, batch):
        return self._error(batch) / 2

    def validation_step(self, batch):
        self.log("mse", self._error(batch))

    def _error(self, batch):
        x, y = batch
        return (self.linear(x).squeeze(1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.4)


def fold(split):
    """Return the data of a fold: all samples in each batch, and as many batches as steps."""
    train, test = ((torch.tensor(X[part]), torch.tensor(Y[part])) for part in FOLDS[split])
    return DataLoader([train] * STEPS, batch_size=None), DataLoader([test], batch_size=None)


STEPS = 400
TRAINER = {"max_epochs": 1, "precision": "64-true", "accelerator": "cpu"}
GRID = [float(alpha) for alpha in np.logspace(-2, 0, 5)]


def path_of(technique, values):
    return strength_path(
        LinearModel, fold, technique, "strength", values=values, metric="mse", trainer=TRAINER, overlap=0.25, progress=False
    )


@pytest.mark.slow
def test_the_path_of_the_lasso_is_that_of_scikit_learn():
    """The same folds, curve, and best value, and the training error too."""
    path = path_of(SoftThresholding, GRID)
    reference = LassoCV(alphas=GRID, cv=FOLDS, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(X, Y)
    expected = reference.mse_path_[::-1]  # from the smallest to the largest value
    assert np.allclose([mean for mean, _ in path.curve()], expected.mean(1), rtol=1e-3)
    assert np.allclose([error for _, error in path.curve()], expected.std(1, ddof=1) / math.sqrt(5), rtol=1e-2)
    assert path.best == pytest.approx(reference.alpha_)
    bound = expected.mean(1).min() + expected.std(1, ddof=1)[expected.mean(1).argmin()] / math.sqrt(5)
    assert path.choice == max(alpha for alpha, mean in zip(GRID, expected.mean(1), strict=True) if mean <= bound)
    assert path.choice > path.best
    assert path.callbacks[0].strength == path.choice
    training = [
        np.mean([mse(Lasso(alpha=alpha, fit_intercept=False, tol=1e-10), train) for train, _ in FOLDS]) for alpha in GRID
    ]
    assert np.allclose([mean for mean, _ in path.curve("training")], training, rtol=1e-3)


@pytest.mark.slow
def test_the_best_ridge_penalty_is_that_of_scikit_learn():
    """scikit-learn's alpha is the number of samples times the strength."""
    grid = GRID[:-1]  # gradient descent diverges at 1
    path = path_of(L2Penalty, grid)
    expected = [
        np.mean([mse(Ridge(alpha=alpha * len(train), fit_intercept=False), train, test) for train, test in FOLDS])
        for alpha in grid
    ]
    assert np.allclose([mean for mean, _ in path.curve()], expected, rtol=1e-3)
    assert path.best == grid[int(np.argmin(expected))]


def mse(solver, train, test=None):
    solver.fit(X[train], Y[train])
    part = train if test is None else test
    return np.mean((solver.predict(X[part]) - Y[part]) ** 2)


def synthetic(function, technique=L2Penalty, argument="strength", values=(0.1, 0.2, 0.4, 0.8), **options):
    """Return a path where a function of the value and the split stands for training."""
    return strength_path(
        None,
        None,
        technique,
        argument,
        values=values,
        run=lambda callbacks, split, seed: function(getattr(callbacks[0], argument), split),
        **{"overlap": 0.25, "progress": False, **options},
    )


def noisy(best, width):
    """Return a curve with its minimum at a value, and splits that differ by a known spread."""
    return lambda value, split: abs(math.log(value / best)) + width * (split - 2)


def test_the_strongest_value_within_one_standard_error_is_chosen():
    standard_error = math.sqrt(2.5 / 5)
    for width, choice in ((0.5, 0.2), (math.log(2) / standard_error * 1.01, 0.4), (10.0, 0.8)):
        path = synthetic(noisy(0.2, width))
        assert (path.best, path.choice) == (0.2, choice)
    assert synthetic(noisy(0.2, 10.0), MaxNorm, "max_norm").choice == 0.1  # a bound: smaller is stronger
    assert synthetic(noisy(0.2, 10.0), stronger="smaller").choice == 0.1
    assert not is_larger("clip_value", None)


def test_higher_may_be_better():
    path = synthetic(lambda value, split: -noisy(0.4, 0.1)(value, split), mode="max")
    assert path.best == path.choice == 0.4


def test_a_strength_at_which_a_run_failed_is_not_chosen():
    path = synthetic(lambda value, split: math.nan if (value, split) == (0.8, 1) else noisy(0.4, 10.0)(value, split))
    assert path.failed == [0.8]
    assert path.choice == 0.4
    assert "failed" in str([list(column.cells) for column in path.table().columns])


def test_other_arguments_come_from_partial(tmp_path):
    path = synthetic(noisy(0.2, 0.1), partial(DropoutInjection, after="Linear"), "p")
    assert repr(path.callbacks) == "[DropoutInjection(0.2, after='Linear')]"
    path.to_yaml(tmp_path / "reg.yaml")
    assert "lightning_reg.DropoutInjection" in (tmp_path / "reg.yaml").read_text()
    assert len(path.to_dataframe()) == 20


def test_the_figure_marks_the_best_and_the_chosen_strength():
    path = synthetic(noisy(0.2, 10.0), values=(0.0001, 0.1, 0.2, 0.8))
    axis = path.figure().axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["best: 0.2", "within one standard error: 0.8", "validation"]
    assert axis.get_xscale() == "log"
    assert synthetic(lambda value, split: value + split, values=(0.0, 1.0, 2.0)).figure().axes[0].get_xscale() == "symlog"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"values": [1.0]}, ValueError, "values must be at least two distinct finite numbers, got"),
        ({"values": [1.0, math.nan]}, ValueError, "values must be at least two distinct finite numbers"),
        ({"values": [-1.0, 1.0]}, ValueError, r"L2Penalty\(strength=-1\): .*strength must be a number in"),
        ({"argument": "strenght"}, TypeError, "strenght"),
        ({"technique": L2Penalty(1.0)}, TypeError, "technique must be a callback class, as in L2Penalty, got"),
        ({"repeats": 2}, ValueError, "repeats must be an integer ≥ 3, got 2"),
        ({"stronger": "bigger"}, ValueError, "stronger must be 'larger' or 'smaller', got 'bigger'"),
    ],
    ids=range(7),
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        synthetic(noisy(0.2, 1.0), **options)


def test_a_failure_at_every_strength_says_why():
    with pytest.raises(RuntimeError, match="a run failed at every value; one of them:\nthe metric is nan"):
        synthetic(lambda value, split: math.nan if split == (0 if value < 0.3 else 1) else 1.0)
