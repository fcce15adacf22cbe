"""Penalties, compared with autograd and with a lower bound on their time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg.functional import add_l1_gradient_, add_l2_gradient_, l1_penalty, l2_penalty
from tests.benchmarks.measuring import Comparison, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def autograd(params: list[Tensor], value: Callable[[list[Tensor]], Tensor]) -> Callable[[], None]:
    """Return a function that adds the gradient of a penalty to the existing gradients by autograd."""
    return lambda: value(params).backward()


def comparisons(label: str, params: list[Tensor]) -> list[Comparison]:
    """Return the comparisons of both penalties, on the gradients and on the loss, for a list of parameters."""
    sums: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "L1": lambda params: sum(p.abs().sum() for p in params),  # type: ignore[return-value]
        "L2": lambda params: sum(p.pow(2).sum() for p in params) / 2,  # type: ignore[return-value]
    }
    penalties = {"L1": l1_penalty, "L2": l2_penalty}
    closed_forms = {"L1": add_l1_gradient_, "L2": add_l2_gradient_}
    rows = []
    for name in sums:
        naive = autograd(params, lambda p, name=name: 1e-4 * sums[name](p))
        on_gradients = lambda name=name: closed_forms[name](params, 1e-4)  # noqa: E731
        on_loss = autograd(params, lambda p, name=name: 1e-4 * penalties[name](p))
        rows.append(Comparison(f"{name} on the gradients, {label}", on_gradients, naive))
        rows.append(Comparison(f"{name} on the loss, {label}", on_loss, naive))
    return rows


def report_floor(label: str, params: list[Tensor], seconds: float) -> str:
    """Return the times of the penalties on the gradients, as multiples of the time of one ``torch._foreach_add_``.

    That is the floor, a lower bound: it reads all weights and gradients and writes all gradients, as a penalty must.
    """
    gradients, weights = [p.grad for p in params if p.grad is not None], [p.detach() for p in params]
    floor = lambda: torch._foreach_add_(gradients, weights, alpha=1e-4)  # noqa: E731
    base, l1, l2 = measure([floor, lambda: add_l1_gradient_(params, 1e-4), lambda: add_l2_gradient_(params, 1e-4)], seconds)
    return (
        f"Penalties on the gradients, {label}: L1 takes {l1 / base:.2f} and L2 {l2 / base:.2f} times as long as one "
        f"torch._foreach_add_ ({base * 1e3:.2f} ms)"
    )
