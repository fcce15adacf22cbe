"""What monitors cost, and how often the interval of ``OverfittingMonitor`` contains the true gap."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from gap_truth import SHARES, covered, missed_by_logs, outcomes
from rich.table import Table
from torch.optim import SGD

from lightning_reg import L2Penalty
from lightning_reg.functional import add_l2_gradient_
from lightning_reg.monitors.watched import Watched
from tests.benchmarks.measuring import measure

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

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


class OfParameters(L2Penalty):
    """A penalty on given parameters, without a fit."""

    def __init__(self, params: list[Tensor], *, adds_to_loss: bool) -> None:
        super().__init__(1e-4)
        self._given: Any = params
        self._adds_to_loss = adds_to_loss

    @property
    def adds_to_loss(self) -> bool:
        """Whether the penalty is part of the gradients, from which it must be subtracted."""
        return self._adds_to_loss

    @property
    def scale(self) -> float:
        """The strength, which no schedule changes."""
        return 1e-4

    def parameters_of(self, optimizer: Optimizer) -> list[Parameter]:
        """Return the parameters."""
        return list(self._given)


def report_cost(label: str, params: list[Tensor], seconds: float) -> str:
    """Return the time of ``ParameterMonitor`` on a step that it measures, in floors of one ``torch._foreach_add_``.

    It is the time of the measurement, without that of putting the values into ``trainer.callback_metrics``, which is reported
    for a single value. What a penalty adds is given for both of its routes, beside the time to add its gradient.
    """
    tensors: Any = params
    gradients, weights = [p.grad for p in params if p.grad is not None], [p.detach() for p in params]
    optimizer = SGD(params, lr=0.1)
    on_gradients, in_loss = (OfParameters(params, adds_to_loss=adds) for adds in (False, True))
    watched = Watched(tensors, [[str(index)] for index in range(len(params))], "")
    with torch.no_grad():
        values = watched.after_step(watched.before_step([], optimizer, []))
        floor, alone, with_gradients, with_loss, gradient, publishing = measure(
            [
                lambda: torch._foreach_add_(gradients, weights, alpha=1e-4),
                lambda: watched.after_step(watched.before_step([], optimizer, [])),
                lambda: watched.after_step(watched.before_step([on_gradients], optimizer, [])),
                lambda: watched.after_step(watched.before_step([in_loss], optimizer, [in_loss])),
                lambda: add_l2_gradient_(params, 1e-4),
                lambda: dict(zip(watched.keys, values.unbind(), strict=True)),
            ],
            seconds,
        )
    times = (f"{time / floor:.2f}" for time in (alone, with_gradients - alone, with_loss - alone, gradient))
    text = "{} floors. An L2 penalty adds {} on the gradients and {} in the loss; its gradient alone takes {}"
    return (
        f"ParameterMonitor, {label}, floor {floor * 1e3:.2f} ms: {text.format(*times)}. Publishing takes "
        f"{publishing / len(values) * 1e6:.2f} µs for each value"
    )
