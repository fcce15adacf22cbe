"""What the constraints share: when they act."""

from __future__ import annotations

from lightning_reg.base import Phase
from lightning_reg.parameters import ParameterRegularizer

__all__ = ["Constraint"]


class Constraint(ParameterRegularizer):
    """A projection of the weights right after each optimizer step."""

    phase = Phase.CONSTRAINT

    def route(self) -> str:
        """Say that it acts after the step."""
        return "after the step"
