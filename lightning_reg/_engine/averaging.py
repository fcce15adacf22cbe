"""Averages of the parameters over the ranks, which some strategies and optimizers compute after a step: post-local SGD."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_reg._engine._lightning import wrap_method
from lightning_reg._engine.steps import with_inner

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Trainer


def averagers(trainer: Trainer) -> list[Any]:
    """Return the objects that average the parameters over the ranks, from the strategy and the optimizers.

    With such an object, the replicas differ between averages.
    """
    optimizers = [inner for optimizer in trainer.optimizers for inner in with_inner(optimizer)]
    owned = [getattr(trainer.strategy, "_model_averager", None), *(getattr(inner, "averager", None) for inner in optimizers)]
    return list({id(found): found for found in owned if callable(getattr(found, "average_parameters", None))}.values())


def wrap_averagers(trainer: Trainer, after: Callable[[], None]) -> list[Callable[[], None]]:
    """Call a function after each average of the parameters over the ranks. Return functions that stop this."""
    return [wrap_method(averager, "average_parameters", partial(_followed, after=after)) for averager in averagers(trainer)]


def _followed(average_parameters: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = average_parameters(*args, **kwargs)
        after()
        return result

    return wrapped
