"""Penalties where DDP does not take a plain mean of the gradients, or where a rank's penalty depends on its data."""

from __future__ import annotations

import pytest
import torch
from distributed_worker import Digits, train
from helpers import TOLERANCE, identical
from reductions_worker import STRENGTH, WEAK, Aside, Bad, Embedded
from torch.testing import assert_close

from lightning_reg import ActivityPenalty, L1Penalty, L2Penalty, NonFiniteGradientGuard
from lightning_reg.custom import Penalty

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*infinite or NaN gradients at step"),
]
WORKER = "reductions_worker.py"


def one_process(callbacks, model):
    return train(callbacks, model, [0, 1], accumulate_grad_batches=2)


def test_replicas_are_identical(ranks):
    for key, result in ranks[0].items():
        other = ranks[1][key]
        if isinstance(result, list):
            assert all(map(identical, result, other)), key
        elif isinstance(result, dict):
            assert identical(result, other), key
        else:
            assert result == other, key


@pytest.mark.parametrize("hook", ["fp16", "PowerSGD"])
def test_a_communication_hook_does_not_touch_a_penalty(ranks, hook):
    ours, by_hand = ranks[0][hook]
    assert_close(ours, by_hand, rtol=1e-6, atol=1e-8)


def test_a_weak_penalty_survives_a_hook_that_rounds_to_float16(ranks):
    """The weights shrink by a factor that float16 gradients, which are multiples of 6e-8, cannot express."""
    before = Digits().net[1].weight.detach().double()
    expected = before.clone()
    velocity = torch.zeros_like(expected)
    for _ in range(12):
        velocity = 0.9 * velocity + WEAK * expected
        expected = expected - 0.1 * velocity
    for shrunk in (ranks[0]["fp16"][0], ranks[0]["fp16, later"]):
        moved = (shrunk["net.1.weight"].double() - before).norm() / (expected - before).norm()
        assert moved == pytest.approx(1.0, abs=0.05)


def test_a_guard_names_the_hook_that_keeps_a_nan(ranks):
    """One bad batch. Without the hook, the next step is good."""
    error = ranks[0]["PowerSGD, NaN"]
    assert (
        "The error feedback of the DDP communication hook may hold the NaN of an earlier step: set use_error_feedback=" in error
    )
    assert ranks[0]["no hook, NaN"] == ""


def test_sparse_gradients_are_penalized(ranks):
    expected = one_process([L2Penalty(STRENGTH, params="all")], Embedded())
    assert_close(ranks[0]["sparse"], expected, **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["sparse"], one_process([], Embedded()), **TOLERANCE)
    others = one_process([L2Penalty(STRENGTH, params="net.*", inject="loss")], Embedded())
    assert_close(ranks[0]["sparse, others"], others, **TOLERANCE)


def test_a_guard_that_zeroes_entries_leaves_the_penalty(ranks):
    guarded = [L2Penalty(STRENGTH), L1Penalty(1e-3), NonFiniteGradientGuard("zero")]
    assert_close(ranks[0]["guarded"], one_process(guarded, Bad()), **TOLERANCE)
    by_route = [
        one_process([L2Penalty(STRENGTH, inject=route), NonFiniteGradientGuard("zero")], Bad())
        for route in ("auto", "gradient")
    ]
    assert identical(*by_route)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("fp16, loss", "under DDP with a communication hook, which may round it"),
        ("sparse, loss", r"under DDP with sparse gradients \(embedding\)"),
        ("guarded, loss", "together with NonFiniteGradientGuard, which may set its gradient to zero"),
    ],
)
def test_the_loss_route_is_refused_where_it_is_not_exact(ranks, key, reason):
    with pytest.raises(ValueError, match=f"inject='loss' is not exact {reason}; use inject='gradient' or 'auto'"):
        raise ValueError(ranks[0][key])


def test_a_penalty_that_depends_on_the_data_is_averaged_on_both_routes(ranks):
    """Also where a parameter counts on one rank only."""

    class Mean(Penalty):
        def value(self, params):
            return sum((1.5 if p.ndim > 1 else 1.0) * p.square().sum() for p in params)

    expected = one_process([Mean(STRENGTH, params="net.1.*")], Digits())
    for route in ("gradient", "loss"):
        assert_close(ranks[0][f"of samples, {route}"], expected, **TOLERANCE)


def test_a_module_that_the_loss_ignores(ranks):
    """Under DDP with ``find_unused_parameters``, it is an error that says what to do; otherwise it is penalized."""
    error = ranks[0]["error"]
    assert error.startswith("ActivityPenalty-aside: the loss does not depend on all parameters behind aside, and DDP with")
    assert error.endswith("exclude the module with '!aside', or use find_unused_parameters=False")
    for key, used in (("plain DDP", False), ("ignored", True)):
        assert_close(ranks[0][key], one_process([ActivityPenalty(0.1, modules="aside")], Aside(used)), **TOLERANCE)
