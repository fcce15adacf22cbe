"""Criteria: the scores of parameters by which pruning ranks their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Parameter

from lightning_reg._tensors.random import hashed
from lightning_reg.pruning.scores import GivenScores, MagnitudeScores, RandomScores, Score, scores_over_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer

Criterion = Literal["magnitude", "random"] | Callable[[str, Parameter], Any]
"""``"magnitude"``, ``"random"``, or a callable ``(name, parameter) -> scores``. The lowest scores are pruned first.

The command line refuses a callable whose annotation does not return what this one names, so it names no type.
"""


def scores_of(
    what: str, criterion: Criterion, params: Mapping[str, Parameter], key: tuple[int, int], trainer: Trainer
) -> list[Score]:
    """Return the scores of parameters. Every rank must call it.

    Args:
        what: The name of the callback, for error messages and random numbers.
        criterion: The criterion.
        params: The parameters by name.
        key: What tells this step from others, for random numbers.
        trainer: The trainer, over whose ranks scores are averaged.

    Raises:
        TypeError: If a callable does not return a tensor.
        ValueError: If its scores have the wrong shape or are not finite.
    """
    if criterion == "magnitude":
        return [MagnitudeScores(p) for p in params.values()]
    if criterion == "random":
        return [RandomScores(p, hashed(what, name, *key)) for name, p in params.items()]
    assert callable(criterion), "checked by the constructor"
    return [_given_scores(what, criterion, name, p, trainer) for name, p in params.items()]


def _given_scores(
    what: str, criterion: Callable[[str, Parameter], Any], name: str, p: Parameter, trainer: Trainer
) -> GivenScores:
    scores = criterion(name, p)
    try:
        return GivenScores(p, scores_over_ranks(trainer, p, scores))
    except (TypeError, ValueError) as error:
        expected = f"{what}: the criterion must return finite scores for {name!r} as a tensor of its shape, got"
        raise type(error)(f"{expected} {error}") from None
