"""Laws that hold after each step, over the table, and three wrong techniques that these laws catch."""

from __future__ import annotations

import pytest
import torch
from helpers import fit, same
from laws import (
    check_new_model,
    check_overlap,
    check_padding,
    check_random_numbers,
    check_routes,
    check_same_name,
    check_schedule,
    check_sparse_gradients,
    check_what_holds,
    is_penalty_with_routes,
)
from observed import optimizer_alone_moves, weights_are
from table import ROWS, Row

from lightning_reg import Linear
from lightning_reg.custom import (
    NON_NEGATIVE,
    POSITIVE,
    Constraint,
    ParameterRegularizer,
    Penalty,
    Phase,
)
from lightning_reg.functional import add_l2_gradient_, l2_penalty

every_callback = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items()])
every_penalty = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in ROWS.items() if is_penalty_with_routes(row)]
)


@every_callback
def test_row_holds_after_each_step(row):
    check_what_holds(row)


@every_penalty
def test_loss_route_equals_gradient_route(row):
    check_routes(row)


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.scheduled])
def test_schedule_switches_at_its_marker(row):
    check_schedule(row)


@every_callback
def test_global_random_generators_are_left_alone(row):
    if "random_numbers" in row.exempt:
        pytest.skip(row.exempt["random_numbers"])
    check_random_numbers(row)


@every_callback
def test_new_model_starts_anew(row):
    check_new_model(row)


@every_callback
def test_padding_rows_do_not_move(row):
    check_padding(row)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=name) for name, row in ROWS.items() if row.inactive and "sparse_gradients" not in row.exempt],
)
def test_inactive_callback_keeps_sparse_gradients(row):
    check_sparse_gradients(row)


@every_callback
def test_two_callbacks_can_overlap(row):
    check_overlap(row)


@every_callback
def test_two_callbacks_with_same_name_raise(row):
    check_same_name(row)


# Correct and wrong techniques, as a contributor might write them -----------------------------------------------------


class SpectralNorm(Constraint):
    """Keeps the largest singular value of each matrix at or below a bound."""

    valid_ranges = {"max_norm": POSITIVE}
    slack = 1.0

    def __init__(self, max_norm, *, params="weights", name=None):
        self.max_norm = max_norm
        super().__init__(params, name)

    def reproject(self, params):
        for p in params:
            norm = torch.linalg.matrix_norm(p, 2)
            p.mul_(min(1.0, self.slack * self.current["max_norm"] / float(norm)))


class LooseSpectralNorm(SpectralNorm):
    """Wrong: scales to 1.7 times its bound."""

    slack = 1.7


class SquaredPenalty(Penalty):
    """J = L + λ/2 Σθ², implemented again."""

    factor = 1.0

    def value(self, params):
        return l2_penalty(params)

    def add_gradient_(self, params, strength):
        add_l2_gradient_(params, self.factor * strength)


class DoubledPenalty(SquaredPenalty):
    """Wrong: doubles its gradient on the gradient route."""

    factor = 2.0


class Noise(ParameterRegularizer):
    """Adds noise to the weights for one forward and backward pass."""

    phase = Phase.FORWARD
    valid_ranges = {"std": NON_NEGATIVE}

    def __init__(self, std, *, params="weights", name=None):
        self.std = std
        super().__init__(params, name)
        self._kept = []

    def before_forward(self, params, step):
        generator = torch.Generator().manual_seed(step.number)
        self._kept = [(p, p.detach().clone()) for p in params]
        for p, _ in self._kept:
            p.add_(torch.randn(p.shape, generator=generator), alpha=self.current["std"])

    def after_backward(self, params):
        for p, kept in self._kept:
            p.copy_(kept)
        self._kept = []

    def route(self):
        return "forward pass"


class UnorderedNoise(Noise):
    """Wrong: uses Lightning's hooks, which undo two callbacks in list order instead of reverse order."""

    def before_forward(self, params, step):
        """Done in ``on_train_batch_start``."""

    def after_backward(self, params):
        """Done in ``on_after_backward``."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        with torch.no_grad():
            self._kept = [(p, p.detach().clone()) for p in self.tensors.values()]
            for p, _ in self._kept:
                p.add_(torch.full_like(p, self.current["std"]))

    def on_after_backward(self, trainer, pl_module):
        super().on_after_backward(trainer, pl_module)
        with torch.no_grad():
            Noise.after_backward(self, None)


def largest_singular_value_at_most(bound):
    def check(expected, after):
        assert float(torch.linalg.matrix_norm(after, 2)) <= bound * (1 + 1e-4)

    return weights_are(check)


def row_of(active, holds):
    return Row(active=active, holds=holds, inactive=None, scheduled=None, parts=None)


SPECTRAL = largest_singular_value_at_most(0.5)
SQUARED = ROWS["L2Penalty"].holds


@pytest.mark.parametrize("kind", [SpectralNorm, LooseSpectralNorm], ids=["right", "wrong"])
def test_loose_constraint_is_caught(kind):
    row = row_of(lambda: kind(0.5), SPECTRAL)
    if kind is LooseSpectralNorm:
        with pytest.raises(AssertionError):
            check_what_holds(row)
    else:
        check_what_holds(row)


@pytest.mark.parametrize("kind", [SquaredPenalty, DoubledPenalty], ids=["right", "wrong"])
@pytest.mark.parametrize("check", [check_routes, check_what_holds], ids=["routes", "holds"])
def test_doubled_gradient_is_caught(kind, check):
    row = row_of(lambda: kind(0.1, inject="gradient"), SQUARED)
    if kind is DoubledPenalty:
        with pytest.raises(AssertionError):
            check(row)
    else:
        check(row)


@pytest.mark.parametrize("kind", [Noise, UnorderedNoise], ids=["right", "wrong"])
def test_noise_removed_in_wrong_order_is_caught(kind):
    row = row_of(lambda: kind(0.1), optimizer_alone_moves)
    if kind is UnorderedNoise:
        with pytest.raises(AssertionError, match=r"net\.0\.weight was changed by something other"):
            check_overlap(row)
    else:
        check_overlap(row)


class EndValue(SquaredPenalty):
    """Wrong: it uses the last value of its schedule from the start."""

    @property
    def scale(self):
        return self.strength.extremes[-1] if callable(self.strength) else self.strength


class FirstValue(SquaredPenalty):
    """Wrong: it never looks at its schedule again."""

    @property
    def scale(self):
        return self.strength.extremes[0] if callable(self.strength) else self.strength


@pytest.mark.parametrize("kind", [SquaredPenalty, EndValue, FirstValue], ids=["right", "end value", "first value"])
def test_an_ignored_schedule_is_caught(kind):
    row = Row(lambda: kind(0.1), SQUARED, inactive=None, scheduled=lambda: kind(Linear(0.01, 0.1)), parts=None)
    if kind is SquaredPenalty:
        check_schedule(row)
    else:
        with pytest.raises(AssertionError):
            check_schedule(row)


class GlobalNoise(Noise):
    """Wrong: it draws from the global generator."""

    def before_forward(self, params, step):
        self._kept = [(p, p.detach().clone()) for p in params]
        for p in params:
            p.add_(torch.randn(p.shape), alpha=self.current["std"])


@pytest.mark.parametrize("kind", [Noise, GlobalNoise], ids=["right", "wrong"])
def test_noise_from_the_global_generator_is_caught(kind):
    row = row_of(lambda: kind(0.1), optimizer_alone_moves)
    if kind is Noise:
        check_random_numbers(row)
    else:
        with pytest.raises(AssertionError):
            check_random_numbers(row)


def test_noise_changes_training():
    """Otherwise a technique that does nothing would pass the law above."""
    assert not same(fit([Noise(0.1)]), fit())
