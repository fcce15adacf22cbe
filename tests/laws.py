"""Laws for every technique, as functions of a table row. Each raises an AssertionError if the law does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers import Classifier, fit, same, weights
from observed import Observed, optimizer_alone_moves
from torch.testing import assert_close

from lightning_reg import Penalty
from lightning_reg._engine.arguments import constructor_arguments
from lightning_reg.custom import ParameterRegularizer, Regularizer

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
