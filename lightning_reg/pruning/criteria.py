"""Criteria: the scores by which pruning ranks weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Parameter

from lightning_reg._engine import _lightning
from lightning_reg._engine.averaging import averagers
from lightning_reg._tensors.random import hashed
from lightning_reg._tensors.reductions import accumulation_dtype
from lightning_reg.pruning.scores import GivenScores, MagnitudeScores, RandomScores, Score, scores_over_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer
    from torch import Tensor

Criterion = Literal["magnitude", "random"] | Callable[[str, Parameter], Any]
"""``"magnitude"``, ``"random"``, or a callable ``(name, parameter) -> scores``. The lowest scores are pruned first.

This type names no return type, because the command line refuses a callable whose annotation differs.
"""


def scores_of(
    what: str, criterion: Criterion, params: Mapping[str, Parameter], key: tuple[int, int], trainer: Trainer
) -> list[Score]:
    """Return the scores of parameters. Every rank must call it.

    Args:
        what: The name of the callback, for error messages and random numbers.
        criterion: The criterion.
        params: The parameters by name.
        key: What distinguishes this step from others, for random numbers.
        trainer: The trainer. Scores are averaged over its ranks.

    Raises:
        TypeError: If a callable does not return a tensor.
        ValueError: If its scores have the wrong shape or are not finite.
    """
    if criterion == "magnitude":
        replicas_differ = bool(averagers(trainer))
        return [MagnitudeScores(_mean_weights(trainer, p) if replicas_differ else p) for p in params.values()]
    if criterion == "random":
        return [RandomScores(p, hashed(what, name, *key)) for name, p in params.items()]
    assert callable(criterion), "checked by the constructor"
    return [_given_scores(what, criterion, name, p, trainer) for name, p in params.items()]


def _mean_weights(trainer: Trainer, p: Parameter) -> Tensor:
    """Return the mean over the ranks, so that all of them prune the same weights."""
    return _lightning.mean_over_ranks(trainer, p.detach().to(accumulation_dtype(p.dtype), copy=True))


def _given_scores(
    what: str, criterion: Callable[[str, Parameter], Any], name: str, p: Parameter, trainer: Trainer
) -> GivenScores:
    scores = criterion(name, p)
    try:
        return GivenScores(p, scores_over_ranks(trainer, p, scores))
    except (TypeError, ValueError) as error:
        expected = f"{what}: the criterion must return finite scores for {name!r} as a tensor of its shape, got"
        raise type(error)(f"{expected} {error}") from None
