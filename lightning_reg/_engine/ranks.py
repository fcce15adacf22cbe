"""Agreement among the ranks of a fit before it starts: the same callbacks, and which ranks log.

Each rank writes its configuration to the store of the process group, and reads those of the others. A collective would hang if
a rank had no callback of this package. The store raises an error that names the rank instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from lightning_reg._engine import _lightning
from lightning_reg._engine.arguments import constructor_arguments, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from lightning_reg._engine.technique import Technique

TIMEOUT = timedelta(seconds=60)


class Agreement(NamedTuple):
    """What the ranks of a fit have agreed on.

    Attributes:
        logs: Whether any rank has a logger. Then every rank computes the metrics, since some of them need all ranks.
        log_every_n_steps: How often they are computed.
    """

    logs: bool
    log_every_n_steps: int


def agree(trainer: Trainer, techniques: Sequence[Technique]) -> Agreement:
    """Compare the callbacks of all ranks, and decide who computes metrics.

    Args:
        trainer: The trainer of the fit.
        techniques: Its techniques, in the order in which they act.

    Raises:
        RuntimeError: If a rank has other callbacks than rank 0, or has not answered within a minute.
    """
    every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
    own: dict[str, Any] = {"callbacks": dict(map(_described, techniques)), "logs": bool(trainer.loggers), "every": every}
    answers = _exchange(trainer, own) if _are_joint(trainer) else [own]
    for rank, answer in enumerate(answers):
        _compare(rank, answer["callbacks"], answers[0]["callbacks"])
    return Agreement(any(answer["logs"] for answer in answers), answers[0]["every"])


def answers_of_all(trainer: Trainer, answer: Any) -> list[Any]:
    """Return the answer of each rank of a fit, by rank. Every rank of the fit must call it."""
    if not _are_joint(trainer):
        return [answer]
    answers: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(answers, answer)
    return answers


def mean_of_all(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Return the mean of each metric over the ranks that have it. Every rank of the fit must call it."""
    answers = answers_of_all(trainer, metrics)
    keys = dict.fromkeys(key for answer in answers for key in answer)
    return {key: fmean(answer[key] for answer in answers if key in answer) for key in keys}


def mean_tensors_of_all(trainer: Trainer, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the mean of tensors over the ranks of a fit. Every rank must call it.

    Args:
        trainer: The trainer of the fit.
        tensors: The tensors of this rank; ``None`` counts as zeros.
        like: For each, a tensor of its shape, dtype, and device.

    Returns:
        The means, with ``None`` where no rank has a tensor.
    """
    if not tensors or not _are_joint(trainer):
        return list(tensors)
    present = torch.tensor([tensor is not None for tensor in tensors], device=like[0].device)
    anywhere = _lightning.any_rank(trainer, present).tolist()
    filled = [torch.zeros_like(shape) if tensor is None else tensor for tensor, shape in zip(tensors, like, strict=True)]
    return [
        _lightning.mean_over_ranks(trainer, tensor) if found else None for tensor, found in zip(filled, anywhere, strict=True)
    ]


def may_differ(technique: Technique) -> bool:
    """Return whether a technique's values may depend on a rank's data: true for techniques that users wrote."""
    return type(technique).__module__.partition(".")[0] != __name__.partition(".")[0]


def _are_joint(trainer: Trainer) -> bool:
    """Return whether the trainer trains on all ranks of the process group. A fit on one rank stands alone."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() == trainer.world_size


def _exchange(trainer: Trainer, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all ranks in the store for this fit."""
    store, rank, ranks = distributed_c10d._get_default_store(), trainer.global_rank, trainer.world_size
    fit = store.add(f"lightning_reg/fits of rank {rank}", 1)
    keys = [f"lightning_reg/fit {fit} of rank {other}" for other in range(ranks)]
    store.set(keys[rank], json.dumps(own))
    _wait(store, keys, own)
    return [json.loads(store.get(key)) for key in keys]


def _wait(store: Any, keys: list[str], own: dict[str, Any]) -> None:
    try:
        store.wait(keys, TIMEOUT)
    except (RuntimeError, torch.distributed.DistStoreError) as error:
        silent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        what = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(silent)} have"
        raise RuntimeError(
            f"{what} started no fit with callbacks of lightning_reg within {TIMEOUT.seconds} seconds, while this rank has "
            f"{_listed(own['callbacks'])}: give every rank the same callbacks"
        ) from error


def _compare(rank: int, callbacks: dict[str, str], first: dict[str, str]) -> None:
    """Raise an error if a rank has other callbacks than rank 0."""
    if callbacks == first:
        return
    if callbacks.keys() == first.keys():
        name = next(name for name in first if first[name] != callbacks[name])
        difference = f"{callbacks[name]} is {first[name]} on rank 0"
    else:
        difference = f"it has {_listed(callbacks)}, but rank 0 has {_listed(first)}"
    raise RuntimeError(
        f"the callbacks of rank {rank} differ from those of rank 0: {difference}; give every rank the same callbacks"
    )


def _listed(callbacks: dict[str, str]) -> str:
    return ", ".join(callbacks.values()) or "none"


def _described(technique: Technique) -> tuple[str, str]:
    """Return the name of a technique and a string with its class and all its arguments, equal in every process."""
    arguments = [argument.name for argument in constructor_arguments(type(technique)) if argument.name != "name"]
    given = (f"{name}={canonical(getattr(technique, name, None))}" for name in arguments)
    return technique.name, f"{type(technique).__name__}({', '.join(given)})"


def canonical(value: Any) -> str:
    """Return a string for a value that is the same in every process: without addresses, and with sets in order.

    Example:
        >>> canonical({"b", "a"}), canonical({"net.*": 0.5}), canonical(len)
        ("{'a', 'b'}", "{'net.*': 0.5}", 'len')
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{canonical(key)}: {canonical(item)}' for key, item in value.items())}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(canonical, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(canonical, value))}]"
    if isinstance(value, Tensor):
        return f"tensor({value.detach().cpu().tolist()})"
    return re.sub(r" at 0x[0-9a-f]+", "", readable(value))
