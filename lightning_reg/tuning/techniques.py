"""The techniques that a search may switch on, and the ranges of their arguments."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_reg import DropoutInjection, GradientNormClipping, L1Penalty, MaxNorm, WeightDecay
from lightning_reg._engine.arguments import close_matches, described_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from optuna import Trial
    from torch import nn

ACTIVATIONS = (
    "CELU",
    "ELU",
    "GELU",
    "Hardswish",
    "LeakyReLU",
    "Mish",
    "NewGELUActivation",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Tanh",
)
"""The classes that the default dropout comes after."""

SMALLER_IS_STRONGER = frozenset({"clip_factor", "clip_value", "max_norm", "quantile", "z"})
"""Arguments that are bounds: smaller values regularize more."""


class Technique:
    """A callback that a search may switch on or off, with the ranges of its arguments.

    Args:
        callback: The callback class, or a function that returns a callback.
        name: The name in tables and databases. The name of the class by default.
        **arguments: For each argument of the callback, an Optuna distribution to search, or a fixed value.

    Raises:
        TypeError: If ``callback`` is not callable, or has no such argument.
        ValueError: If the callback rejects the bounds of a distribution.

    Example:
        >>> from lightning_reg import L2Penalty
        >>> Technique(L2Penalty, strength=FloatDistribution(1e-5, 1e-2, log=True), params="weights")
        Technique(L2Penalty, strength=FloatDistribution(high=0.01, log=True, low=1e-05, step=None), params='weights')
        >>> Technique(L2Penalty, strength=FloatDistribution(-1.0, 1.0))
        Traceback (most recent call last):
        ValueError: Technique L2Penalty: L2Penalty(strength=-1.0): L2Penalty: strength must be a number in [0, inf), got -1.0
    """

    def __init__(self, callback: Callable[..., Callback], *, name: str | None = None, **arguments: Any) -> None:
        if isinstance(callback, Callback) or not callable(callback):
            raise TypeError(f"Technique: expected a callback class, as in L2Penalty, got {described_value(callback)}")
        self.callback = callback
        self.name: str = name or str(getattr(callback, "__name__", type(callback).__name__))
        self.arguments = arguments
        self._check_names()
        for values in self._corners():
            self.build(values)

    def __repr__(self) -> str:
        shown = [self.name, *(f"{key}={value!r}" for key, value in self.arguments.items())]
        return f"Technique({', '.join(shown)})"

    @property
    def ranges(self) -> dict[str, BaseDistribution]:
        """The arguments to search, each with its distribution."""
        return {key: value for key, value in self.arguments.items() if isinstance(value, BaseDistribution)}

    def suggest(self, trial: Trial) -> dict[str, Any] | None:
        """Return values that a trial suggests, or ``None`` if it leaves the technique out."""
        if not trial.suggest_categorical(self.name, (False, True)):
            return None
        return {key: _suggested(trial, f"{self.name}.{key}", distribution) for key, distribution in self.ranges.items()}

    def build(self, values: Mapping[str, Any]) -> Callback:
        """Return a callback with the given values and the fixed arguments.

        Raises:
            TypeError: If the callback rejects the type of a value.
            ValueError: If the callback rejects a value.
        """
        fixed = {key: value for key, value in self.arguments.items() if key not in self.ranges}
        try:
            return self.callback(**fixed, **values)
        except (TypeError, ValueError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in values.items())
            raise type(error)(f"Technique {self.name}: {self.name}({given}): {error}") from error

    def _check_names(self) -> None:
        try:
            parameters = inspect.signature(self.callback).parameters
        except ValueError:
            return
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        for key in self.arguments.keys() - parameters.keys():
            raise TypeError(f"Technique {self.name}: no argument {key!r}; close matches: {close_matches(key, parameters)}")

    def _corners(self) -> list[dict[str, Any]]:
        """Return values with each argument at both ends of its range and the others at their first values."""
        ends = {key: _ends(distribution) for key, distribution in self.ranges.items()}
        first = {key: values[0] for key, values in ends.items()}
        return [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]


def _suggested(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return [distribution.low, distribution.high]


DEFAULT_RANGES: dict[type[Callback], dict[str, Any]] = {
    # A. Kadra et al., "Well-tuned Simple Nets Excel on Tabular Datasets", 2021, table of the search space
    WeightDecay: {"weight_decay": FloatDistribution(1e-5, 1e-1, log=True)},
    # no source: a tenth to a thousandth of the loss of a small network with weights near 0.1
    L1Penalty: {"strength": FloatDistribution(1e-7, 1e-3, log=True)},
    # N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014: 0.2 to 0.5
    DropoutInjection: {"p": FloatDistribution(0.05, 0.5)},
    # the same: 3 to 4, and up to 5 in their experiments
    MaxNorm: {"max_norm": FloatDistribution(1.0, 5.0, log=True)},
    # R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", 2013: half to ten times the
    # average norm, which is near 1 for a normalized model
    GradientNormClipping: {"max_norm": FloatDistribution(0.1, 10.0, log=True)},
}
"""The default techniques, each with its default range and the source of that range."""


def default_techniques(module: nn.Module | None = None) -> list[Technique]:
    """Return the default techniques of a search.

    Args:
        module: The model. Dropout is added after its activation layers. If it has none, dropout is left out.

    Example:
        >>> from torch import nn
        >>> [technique.name for technique in default_techniques(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))]
        ['WeightDecay', 'L1Penalty', 'DropoutInjection', 'MaxNorm', 'GradientNormClipping']
    """
    classes = {type(layer).__name__ for layer in module.modules()} if module is not None else set()
    activations = sorted(classes & set(ACTIVATIONS))
    found = []
    for callback, ranges in DEFAULT_RANGES.items():
        if callback is not DropoutInjection:
            found.append(Technique(callback, **ranges))
        elif activations:
            found.append(Technique(callback, **ranges, after=activations))
    return found


def smaller_is_stronger(argument: str) -> bool:
    """Return whether smaller values of an argument regularize more, as for a bound.

    Example:
        >>> smaller_is_stronger("max_norm"), smaller_is_stronger("strength")
        (True, False)
    """
    return argument in SMALLER_IS_STRONGER
