"""Penalties beside their autograd versions, and beside the floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_reg.functional import add_l1_gradient_, add_l2_gradient_, l1_penalty, l2_penalty
from tests.benchmarks.measuring import Claim, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def autograd(params: list[Tensor], value: Callable[[list[Tensor]], Tensor]) -> Callable[[], None]:
    """Return what differentiates a penalty into the gradients that there are."""
    return lambda: value(params).backward()


def claims(label: str, params: list[Tensor], gradient: dict[str, float], loss: float) -> list[Claim]:
    """Return the claims on both penalties and both routes for one set of parameters."""
    sums: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "L1": lambda params: sum(p.abs().sum() for p in params),  # type: ignore[return-value]
        "L2": lambda params: sum(p.pow(2).sum() for p in params) / 2,  # type: ignore[return-value]
    }
    fused = {"L1": l1_penalty, "L2": l2_penalty}
    added = {"L1": add_l1_gradient_, "L2": add_l2_gradient_}
    found = []
    for name in sums:
        naive = autograd(params, lambda p, name=name: 1e-4 * sums[name](p))
        by_gradient = lambda name=name: added[name](params, 1e-4)  # noqa: E731
        found.append(Claim(f"{name}, gradient route, {label}", by_gradient, naive, gradient[name]))
        found.append(
            Claim(f"{name}, loss route, {label}", autograd(params, lambda p, name=name: 1e-4 * fused[name](p)), naive, loss)
        )
    return found


def report_floor(label: str, params: list[Tensor], seconds: float) -> str:
    """Say how many times longer than one ``torch._foreach_add_`` the gradient route takes."""
    gradients, weights = [p.grad for p in params if p.grad is not None], [p.detach() for p in params]
    floor = lambda: torch._foreach_add_(gradients, weights, alpha=1e-4)  # noqa: E731
    base, *times = measure([floor, lambda: add_l1_gradient_(params, 1e-4), lambda: add_l2_gradient_(params, 1e-4)], seconds)
    most = {"L1": 3, "L2": 1.2}
    told = ", ".join(f"{name} {took / base:.2f} × (at most {most[name]} ×)" for name, took in zip(most, times, strict=True))
    return f"To the floor, one torch._foreach_add_ over {label} ({base * 1e3:.2f} ms): {told}"
