"""Building blocks for your own techniques: base classes, phases of the step, and ranges of values.

Subclass the base class closest to what your technique does, store every constructor argument under its own name, call
``super().__init__``, and override one or two methods:

- ``Penalty``: a term of the objective. Override ``value``.
- ``GradientProcessing``: a change to the gradients before the step. Set ``phase``; override ``gradients``.
- ``Constraint``: a projection of the weights after the step. Override ``reproject``.
- ``ParameterRegularizer``, ``ModuleRegularizer``, ``Regularizer``: anything else on selected parameters, on modules, or
  without a selection. Set ``phase``; override any method of ``Regularizer``, and ``route``, which the summary shows.

``valid_ranges`` names the arguments that may be schedules, and the valid values of each. ``self.current`` holds their values at
the current progress.

Example:
    A constraint that rounds weights to multiples of a step size.

    >>> from lightning_reg.custom import POSITIVE, Constraint
    >>> class RoundedWeights(Constraint):
    ...     valid_ranges = {"step_size": POSITIVE}
    ...     def __init__(self, step_size, *, params="weights", name=None):
    ...         self.step_size = step_size
    ...         super().__init__(params, name)
    ...     def reproject(self, params):
    ...         for p in params:
    ...             p.div_(self.current["step_size"]).round_().mul_(self.current["step_size"])
    >>> RoundedWeights(0.25, params="head.*")
    RoundedWeights(0.25, params='head.*')
"""

from lightning_reg._engine.arguments import NON_NEGATIVE, POSITIVE, PROBABILITY, Interval
from lightning_reg._engine.modules import ModuleRegularizer
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.plan import Step
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg._engine.technique import Phase
from lightning_reg.constraints.base import Constraint
from lightning_reg.gradients.base import GradientProcessing
from lightning_reg.penalties.base import Penalty

__all__ = [
    "NON_NEGATIVE",
    "POSITIVE",
    "PROBABILITY",
    "Constraint",
    "GradientProcessing",
    "Interval",
    "ModuleRegularizer",
    "ParameterRegularizer",
    "Penalty",
    "Phase",
    "Regularizer",
    "Step",
]
