"""The base class of constraints: projections of the weights after each optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.technique import Phase

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step


class Constraint(ParameterRegularizer):
    """Base class of callbacks that project the weights after each optimizer step: θ ← argmin_{w ∈ C} ‖w − θ‖.

    Runs in: right after ``optimizer.step()``, once per step, except after a step that a loss scaler or a guard skips. Also at
    the end of an epoch, if pruning or shrinkage may have changed the weights.

    A subclass overrides ``reproject``, which changes the parameters in place. To log metrics, or to act differently after a
    step, it also overrides ``weights``.
    With sharded parameters, ``reproject`` gets the sharded tensors.

    Args:
        params: The parameters to act on: ``"weights"`` (no biases or normalization parameters), ``"all"``, a glob, a list of
            these, or a callable ``(name, parameter, module) -> bool``.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

    Raises:
        ValueError: If nothing is selected.

    Example:
        >>> class UnitInterval(Constraint):  # 0 ≤ θ ≤ 1
        ...     def reproject(self, params):
        ...         for p in params:
        ...             p.clamp_(0.0, 1.0)
        >>> callback = UnitInterval(params="head.*", name=None)
    """

    phase = Phase.CONSTRAINT

    def weights(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Project the weights."""
        self.reproject(params)

    @abstractmethod
    def reproject(self, params: list[Parameter]) -> None:
        """Project the weights, in place."""

    def route(self) -> str:
        """Return where the constraint acts: after the optimizer step."""
        return "after the step"
