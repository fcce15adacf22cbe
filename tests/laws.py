"""Laws for every technique, as functions of a table row. Each raises an AssertionError if the law does not hold."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import Classifier, Memory, fit, same, weights
from observed import Observed, optimizer_alone_moves
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_reg import Penalty, Steps
from lightning_reg._engine.arguments import constructor_arguments
from lightning_reg.custom import GradientProcessing, ParameterRegularizer, Regularizer
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from table import Row

ACT_ON_WEIGHTS = ("before_update", "weights", "epoch_end")


def changed(callback: Regularizer, **arguments: Any) -> Regularizer:
    """Return a new callback of the same class with some arguments changed."""
    given = {argument.name: callback._repr_value(argument.name) for argument in constructor_arguments(type(callback))}
    return type(callback)(**{**given, **arguments})


def check_what_holds(row: Row) -> None:
    """The row's ``holds`` passes after each step, and fails without the callback."""
    model = Observed(row.holds, **row.options)
    fit([row.active()], model)
    assert model.steps == 8
    if "changes_training" not in row.exempt:
        with pytest.raises(AssertionError):
            fit([], Observed(row.holds, **row.options))


def check_routes(row: Row) -> None:
    """A penalty has the same effect on the loss route and on the gradient route."""
    to_loss, to_gradients = (fit([changed(row.active(), inject=route)]) for route in ("loss", "gradient"))
    assert_close(weights(to_gradients), weights(to_loss), rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(weights(to_loss), weights(fit()), rtol=1e-4, atol=1e-6)


class AfterTwo(Classifier):
    """The model, with a copy of its weights after two of eight steps."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 2:
            self.early = weights(self)


def check_schedule(row: Row) -> None:
    """A schedule's first value acts until its marker and not beyond: neither the first nor the last value acts throughout."""
    callback = row.scheduled()
    schedules = {key: value for key, value in vars(callback).items() if isinstance(value, Schedule)}
    assert schedules
    ends = {key: (schedule.extremes[0], schedule.extremes[-1]) for key, schedule in schedules.items()}

    def trained(**values: Any) -> AfterTwo:
        return fit([changed(callback, **values)], AfterTwo(**row.options))

    switched = trained(**{key: Steps(list(values), at=["3st"]) for key, values in ends.items()})
    first = trained(**{key: values[0] for key, values in ends.items()})
    assert_close(switched.early, first.early, rtol=0.0, atol=0.0)
    assert not same(switched, first)


class Padded(Classifier):
    """The model with tables of embeddings, whose padding rows never get a gradient.

    Args:
        padding: The value of the padding rows.
    """

    def __init__(self, padding: float = 0.0, **options: float) -> None:
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.table = nn.Embedding(11, 64, padding_idx=-1)
            self.bag = nn.EmbeddingBag(11, 64, padding_idx=0)
        with torch.no_grad():
            self.table.weight.mul_(0.1)[10] = padding
            self.bag.weight.mul_(0.1)[0] = padding

    @property
    def padding_rows(self) -> list[Tensor]:
        return [self.table.weight[10].detach(), self.bag.weight[0].detach()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        tokens = torch.stack([labels, torch.full_like(labels, 10)], 1)
        return super().training_step((images + self.table(tokens).sum(1) + self.bag(10 - tokens), labels), batch_idx)


def check_padding(row: Row) -> None:
    """Padding rows of zeros stay zeros. What acts on gradients leaves padding rows alone whatever their values."""
    values = (0.0, 0.5) if isinstance(row.active(), GradientProcessing) else (0.0,)
    for value in values:
        model = fit([row.active()], Padded(value, **row.options))
        assert all(torch.equal(padding, torch.full_like(padding, value)) for padding in model.padding_rows)


class Sparse(Classifier):
    """The model with a table of embeddings with sparse gradients, which contain each index several times."""

    def __init__(self, **options: float) -> None:
        super().__init__(**{"momentum": 0.0, **options})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.table = nn.Embedding(10, 64, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images + self.table(labels % 3), labels), batch_idx)


def check_sparse_gradients(row: Row) -> None:
    """An inactive callback changes no bit of a model with sparse gradients, with and without a logger."""
    plain = fit(model=Sparse(**row.options))
    for options in ({}, {"logger": Memory(), "log_every_n_steps": 1}):
        assert same(fit([row.inactive()], Sparse(**row.options), **options), plain)


def check_new_model(row: Row) -> None:
    """A callback that has trained one model trains another as a new callback does, also if both have the same shapes."""
    callback = row.active()
    fit([callback], Classifier(**row.options))
    assert same(fit([callback], Classifier(**row.options)), fit([row.active()], Classifier(**row.options)))

    def other() -> Classifier:
        model = Classifier(**row.options)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        return model

    assert same(fit([callback], other()), fit([row.active()], other()))


def random_states(row: Row, callbacks: list[Regularizer]) -> tuple[Any, ...]:
    """Return the states of all global random generators after a fit."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what is tested
    fit(callbacks, Classifier(**row.options))
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def check_random_numbers(row: Row) -> None:
    """Training draws the same random numbers with and without the callback."""
    assert random_states(row, [row.active()]) == random_states(row, [])


def overlapping(row: Row) -> list[Regularizer]:
    """Return two callbacks of one class. The second acts on part of the first one's parameters, or on all of them."""
    first = row.active()
    if isinstance(first, ParameterRegularizer):
        return [first, changed(first, params="net.0.weight", name="second")]
    return [first, changed(first, name="second")]


def refused(callbacks: list[Regularizer], row: Row) -> str | None:
    """Return the error message raised before the first step, or ``None`` if there is none."""
    try:
        fit(callbacks, Classifier(**row.options), max_steps=0)
    except ValueError as error:
        return str(error)
    return None


def check_overlap(row: Row) -> None:
    """Two callbacks of one class on overlapping parameters work in any order, or an error names both.

    Only the optimizer moves the weights, unless the technique is meant to change them.
    """
    acts_on_weights = any(row.active().overrides(method) for method in ACT_ON_WEIGHTS) or row.options
    holds = (lambda model: None) if acts_on_weights else optimizer_alone_moves
    refusal = refused(overlapping(row), row)
    if refusal is not None:
        assert all(callback.name in refusal for callback in overlapping(row)), refusal
        return
    both = fit(overlapping(row), Observed(holds, **row.options))
    assert same(both, fit(overlapping(row)[::-1], Observed(holds, **row.options)))
    keys = {callback.state_key for callback in overlapping(row)}
    assert len(keys) == 2


def check_same_name(row: Row) -> None:
    """Two callbacks with the same name raise an error before training, which suggests ``name=``."""
    with pytest.raises(ValueError, match=r"two callbacks have the name '.*': set name='…' for one of them"):
        fit([row.active(), row.active()], Classifier(**row.options))


def is_penalty_with_routes(row: Row) -> bool:
    """Return whether a row's callback is a penalty with a loss route and a gradient route."""
    return isinstance(row.active(), Penalty)
