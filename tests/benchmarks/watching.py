"""What monitors cost, and how often the interval of ``OverfittingMonitor`` contains the true gap."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch
from gap_truth import SHARES, covered, missed_by_logs, outcomes
from rich.table import Table

from lightning_reg.functional import add_l2_gradient_
from lightning_reg.monitors.measures import copy_with_squares, squares_of_each, update_sums_of_each
from tests.benchmarks.measuring import measure

if TYPE_CHECKING:
    from torch import Tensor

FITS = 100
"""The number of fits for each share of wrong labels."""


def coverage_table() -> Table:
    """Train 300 small models on digits with wrong labels, and return a table of the results."""
    found = outcomes(range(FITS))
    table = Table(title=f"Gap between validation and training data: {covered(found)} of {len(found)} intervals contain it")
    for column in ("Wrong labels", "contained", "true gap", "measured", "logged", "logged − true"):
        table.add_column(column, justify="right")
    for share in SHARES:
        fits = [one for one in found if one.share == share]
        gaps = [fmean(values) for values in zip(*((one.true_gap, one.gap, one.logged_gap) for one in fits), strict=True)]
        cells = [
            f"{share:.0%}",
            f"{covered(fits)} of {len(fits)}",
            *(f"{gap:.2f}" for gap in gaps),
            f"{missed_by_logs(fits):.2f}",
        ]
        table.add_row(*cells)
    return table


def report_cost(label: str, params: list[Tensor], seconds: float) -> str:
    """Return the time of ``ParameterMonitor`` on a step that it measures, as a multiple of one ``torch._foreach_add_``.

    Its measurement of a penalty is compared with the gradient of the penalty, into gradients of zeros.
    """
    gradients, weights = [p.grad for p in params if p.grad is not None], [p.detach() for p in params]

    copies = [torch.empty_like(weight) for weight in weights]

    def monitor() -> None:
        squares_of_each(gradients)
        copy_with_squares(copies, weights)
        update_sums_of_each(copies, weights)

    def penalty() -> None:
        for p in params:
            p.grad = torch.zeros_like(p)
        add_l2_gradient_(params, 1e-4)

    def measured_penalty() -> None:
        penalty()
        squares_of_each([p.grad for p in params if p.grad is not None])
        squares_of_each(gradients)

    floor = lambda: torch._foreach_add_(gradients, weights, alpha=1e-4)  # noqa: E731
    base, ours, alone, with_norms = measure([floor, monitor, penalty, measured_penalty], seconds)
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return (
        f"ParameterMonitor, {label}: {ours / base:.2f} times as long as one torch._foreach_add_ ({base * 1e3:.2f} ms), and for "
        f"each penalty {with_norms / alone:.2f} times as long as its gradient, {(with_norms - alone) / base:.2f} floors more"
    )
