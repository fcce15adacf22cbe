"""A synthetic objective in place of training, for the tests of searches."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

from lightning.pytorch import Callback
from optuna.distributions import FloatDistribution

from lightning_reg.tuning import Technique

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Candidate(Callback):
    """A callback with a value, and a ``repr`` that shows it."""

    def __init__(self, x: float) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.x})"


class Helpful(Candidate):
    """A technique that helps, if the objective says so."""


class Useless(Candidate):
    """A technique that only draws new random numbers."""


class Placebo(Candidate):
    """Another one."""


def techniques() -> list[Technique]:
    """Return three techniques, each with one argument in [0, 1]."""
    return [Technique(cls, x=FloatDistribution(0.0, 1.0)) for cls in (Helpful, Useless, Placebo)]


def objective(study: int, effect: float, correlation: float = 0.5) -> Callable[[Sequence[Callback], int, int], float]:
    """Return a run with standard deviation 1, where runs on one split correlate, and ``Helpful`` adds an effect."""

    def run(callbacks: Sequence[Callback], split: int, seed: int) -> float:
        common, own = Random(f"{study} {split}").gauss(0, 1), Random(f"{study} {split} {callbacks}").gauss(0, 1)
        noise = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
        return noise + effect * any(isinstance(callback, Helpful) for callback in callbacks)

    return run
