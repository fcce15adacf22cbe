"""One rank of fits in which the ranks were given different things. It saves what each logs, or the error that it gets.

Started by ``test_ranks.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distributed_worker import Digits, Sharded, ddp, failure, sharded, train
from helpers import Memory
from laws_worker import TENSOR_PARALLEL, Parallel, active_callbacks
from lightning.pytorch.strategies import ModelParallelStrategy
from table import ROWS
from torch import nn

from lightning_reg import ActivityPenalty, GradientNormClipping, L1Penalty, L2Penalty, MaxNorm, WeightPruning
from lightning_reg._engine import ranks
from lightning_reg.custom import GradientProcessing, Penalty

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Callback, LightningModule
    from torch import Tensor

RANK = int(os.environ.get("RANK", "0"))
LOGS_RANK_0 = "a logger on rank 0 alone"


class OfSamples(Penalty):
    """A penalty whose value depends on the samples of a rank."""

    def value(self, params: list[Tensor]) -> Tensor:
        return sum(p.square().sum() for p in params) * (RANK + 1)


class Logs(GradientProcessing):
    """A technique that logs what only its rank knows, under names that only some ranks have."""

    phase = GradientNormClipping.phase
    valid_ranges: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__("all", None)

    def gradients(self, *args: Any) -> None:
        if self.logging:
            self.log_metrics(rank=float(RANK), **({"first": 7.0} if RANK == 0 else {}))


def logged(callbacks: list[Callback], model: LightningModule, samples: list[int], **options: object) -> list[dict[str, float]]:
    """Train an epoch and return what callbacks find in ``callback_metrics`` at its end."""
    memory = Memory()
    options = {"max_epochs": 1, "logger": memory if options.pop("logs", True) else False, **options}
    train(callbacks, model, samples, **options)
    metrics = model.trainer.callback_metrics
    return {key: value.item() for key, value in metrics.items() if key.startswith("reg/")}


def every_row(kind: Callable[[], dict[str, object]], model: type[LightningModule], exempt: str) -> dict[str, dict[str, float]]:
    """Return what each callback of the table logs."""
    rows = {name: row for name, row in ROWS.items() if exempt not in row.exempt}
    return {name: logged([row.active()], model(**row.options), [RANK], **kind()) for name, row in rows.items()}


def different(mine: list[list[Callback]]) -> tuple[str, float]:
    """Train with other callbacks on each rank; return the error, and how long it took."""
    start = time.monotonic()
    error = failure(mine[RANK], Digits(), [RANK], max_epochs=1, **ddp())
    return error, time.monotonic() - start


def loggers_of_one_rank(kind: Callable[[], dict[str, object]], model: type[LightningModule]) -> dict[str, dict[str, float]]:
    callbacks = {
        "clipping": lambda: [GradientNormClipping(0.1)],
        "all": lambda: [
            ROWS[name].active()
            for name in (
                "GradientValueClipping",
                "AdaptiveGradientClipping",
                "L1Penalty",
                "MaxNorm",
                "GradientNoise",
                "ActivityPenalty",
            )
        ],
    }
    return {name: logged(given(), model(), [RANK], logs=RANK == 0, **kind()) for name, given in callbacks.items()}


def alone(rank: int | None) -> dict[str, float] | None:
    """Train a model on one rank, or each rank its own, while the process group lives."""
    if rank not in (None, RANK):
        return None
    torch.manual_seed(RANK)
    model = Digits()
    model.net[1] = nn.Linear(64, 32)  # not the same on both ranks
    return logged([GradientNormClipping(0.05 * (RANK + 1)), L1Penalty(1e-3), WeightPruning(0.5)], model, [RANK], devices=1)


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tensor_parallel = lambda: {"strategy": ModelParallelStrategy(1, 2), "devices": 2}  # noqa: E731
    results: dict[str, Any] = {
        "DDP": every_row(ddp, Digits, "no such law"),
        "sharded": every_row(sharded, Sharded, "sharded"),
        "tensor parallel": logged(active_callbacks(TENSOR_PARALLEL), Parallel(), [0], **tensor_parallel()),
        "columns": logged([ActivityPenalty(1e-3, modules="net.1")], Parallel(), [0], **tensor_parallel()),
        "of samples": logged([OfSamples(1e-3)], Digits(), [RANK], **ddp()),
        "of a user": logged([Logs()], Digits(), [RANK], **ddp()),
        LOGS_RANK_0: loggers_of_one_rank(ddp, Digits),
        f"{LOGS_RANK_0}, sharded": loggers_of_one_rank(sharded, Sharded),
        "alone, each": alone(None),
        "alone, rank 0": alone(0),
        "setting": different([[L2Penalty(0.1)], [L2Penalty(0.2)]]),
        "other callback": different([[L2Penalty(0.1)], [L1Penalty(0.1), MaxNorm(1.0)]]),
        "same in another order": different([[L2Penalty(0.1), MaxNorm(1.0)], [MaxNorm(1.0), L2Penalty(0.1)]]),
        "same set": different([[L2Penalty(0.1, params=lambda name, p, module: p.ndim > 1)]] * 2),
    }
    torch.save(results, folder / f"{RANK}.pt")
    ranks.TIMEOUT = timedelta(seconds=3)
    results["missing"] = different([[L2Penalty(0.1)], []])  # breaks the group
    torch.save(results, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
