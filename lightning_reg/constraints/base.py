"""Base of constraints: projections of the weights after each optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step


class Constraint(ParameterRegularizer):
    """Base of callbacks that project the weights right after each optimizer step, and again at the end of an epoch.

    A subclass overrides ``reproject``, and ``weights`` if it measures something or acts differently after a step.
    """

    phase = Phase.CONSTRAINT

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Project the weights."""
        self.reproject(params)

    def route(self) -> str:
        """Say that it acts after the step."""
        return "after the step"
