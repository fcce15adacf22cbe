"""Criteria: the scores of parameters by which pruning ranks their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_reg._engine import _lightning
from lightning_reg._tensors.random import hashed
from lightning_reg.pruning.scores import GivenScores, MagnitudeScores, RandomScores, Score

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
    expected = f"{what}: the criterion must return finite scores for {name!r} as a tensor of its shape, got"
    if not isinstance(scores, Tensor):
        raise TypeError(f"{expected} {scores!r:.80} of type {type(scores).__name__}")
    if not isinstance(scores, DTensor):
        copied = scores.detach().to(torch.float32, copy=True)  # they may be the weights themselves, or of half precision
        scores = _lightning.mean_over_ranks(trainer, copied)
    try:
        return GivenScores(p, scores)
    except ValueError as error:
        raise ValueError(f"{expected} {error}") from None
