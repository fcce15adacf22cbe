"""Temporary changes of the weights for one forward and backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_reg._engine.steps import held_by

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.technique import Technique


class ForwardChanges:
    """Lets techniques change the weights for the forward and backward passes of a training step.

    Args:
        techniques: The techniques that change weights, in the order in which they act.
        parameters_of: Returns the parameters that a technique may change now.
        step: Returns the number of the current optimizer step.
        automatic: Whether the fit uses automatic optimization. In manual optimization, several backward passes may share a
            forward pass, so the changes stay until the optimizer of the parameters steps.
    """

    def __init__(
        self,
        techniques: Sequence[Technique],
        parameters_of: Callable[[Technique], list[Parameter]],
        step: Callable[[], Step],
        automatic: bool,
    ) -> None:
        self._techniques = techniques
        self._parameters_of = parameters_of
        self._step = step
        self._automatic = automatic
        self._in_training_step = False
        self._made: list[tuple[Technique, list[Parameter]]] = []

    def enter_training_step(self) -> None:
        """Make the changes."""
        self._in_training_step = True
        self._make()

    def leave_training_step(self, output: Any) -> None:
        """Undo the changes if no backward pass follows: a skipped batch, manual optimization, an error."""
        self._in_training_step = False
        if output is None or not self._automatic:
            self.undo()

    def after_backward(self) -> None:
        """Undo the changes. In manual optimization, wait for the step, because other backward passes may follow."""
        if self._automatic:
            self.undo()

    def end_step(self) -> None:
        """Restore the changes, since another forward pass may follow in this training step."""
        if self._in_training_step and not self._automatic:
            self._make()

    def undo(self, optimizer: Optimizer | None = None) -> None:
        """Undo the changes in reverse order, for all parameters or those of an optimizer.

        The graphs of other optimizers' parameters may still be needed, and must not see them change.
        """
        if not self._made:
            return
        left = []
        while self._made:
            technique, params = self._made.pop()
            held = params if optimizer is None else _those_of(optimizer, params)
            if len(held) < len(params):
                done = set(map(id, held))
                left.append((technique, [p for p in params if id(p) not in done]))
            if held:
                with torch.no_grad():
                    technique.after_backward(held)
        self._made = left[::-1]

    def before_manual_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Apply the changes in each evaluation of a closure, but not in the update. This is a step pre-hook."""
        given = args[1] if len(args) > 1 else kwargs.get("closure")
        if given is None:
            self.undo(optimizer)
            return args, kwargs

        def closure() -> Any:
            self._make()
            result = given()
            self.undo(optimizer)
            return result

        return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})

    def _make(self) -> None:
        """Let techniques change the weights, unless they already have."""
        changed = [(technique, p) for technique, params in self._made for p in params]
        for technique in self._techniques:
            known = {id(p) for other, p in changed if other is technique}
            params = [p for p in self._parameters_of(technique) if id(p) not in known]
            if params:
                with torch.no_grad():
                    technique.before_forward(params, self._step())
                self._made.append((technique, params))


def _those_of(optimizer: Optimizer, params: Sequence[Parameter]) -> list[Parameter]:
    """Return those parameters that an optimizer holds."""
    held = set(map(id, held_by(optimizer)))
    return [p for p in params if id(p) in held]
