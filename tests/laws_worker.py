"""One rank of a distributed run over the table: each callback alone, all pairs, larger sets, and checkpoints.

Started by ``test_distributed_laws.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from distributed_worker import Digits, Sharded, batches, ddp, full_tensor, sharded, train
from helpers import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from resume_worker import Resumable
from table import PAIRS, ROWS, SETS
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Callback
    from torch.utils.data import DataLoader


class Parallel(Digits):
    """The digits model with tensor-parallel layers, split by columns and by rows. Every rank sees every sample.

    Without dropout, since each rank draws masks for its part of the activations, as torch's dropout does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            plan = {"net.1": ColwiseParallel(), "net.4": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)


def options(names: Sequence[str]) -> dict[str, float]:
    """Return the model arguments that some rows need."""
    return {key: value for name in names for key, value in ROWS[name].options.items()}


def active_callbacks(names: Sequence[str]) -> list[Callback]:
    """Return the active callbacks of some rows."""
    return [ROWS[name].active() for name in names]


def train_three_steps(callbacks: list[Callback], names: Sequence[str], ranks: list[int], **trainer: object) -> Tensor:
    """Train for three steps and return all weights in one vector."""
    steps = {"max_epochs": 1, "logger": False, "limit_train_batches": 3 * int(trainer.get("accumulate_grad_batches", 1))}
    weights = train(callbacks, Digits(**options(names)), ranks, **{**steps, **trainer})
    return nn.utils.parameters_to_vector(weights.values())


def train_and_resume(folder: Path, rank: int, full_checkpoint: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train with sharded parameters, then resume from a mid-epoch checkpoint; return the weights of both runs."""
    weights = []
    for resume in (None, folder / "step=4.ckpt"):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not full_checkpoint)
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [*active_callbacks([*SETS[0], "WeightPruning", "ZScoreGradientClipping", "StartingPointPenalty"]), saves]
        model, options = (
            Sharded(),
            {**QUIET, "enable_checkpointing": True, "devices": 2, "max_epochs": 3, "use_distributed_sampler": False},
        )
        Trainer(**options, strategy=strategy, callbacks=callbacks).fit(model, loader_of(rank), ckpt_path=resume)
        weights.append({name: full_tensor(p) for name, p in model.named_parameters()})
    return weights[0], weights[1]


def loader_of(rank: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return a resumable loader of one rank's batches."""
    return Resumable(batches([rank]).dataset, batch_sampler=batches([rank]).batch_sampler)


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    results: dict[str, object] = {}
    for name, row in ROWS.items():
        results[f"DDP, {name}"] = train([row.active()], Digits(**row.options), [rank], max_epochs=1, **ddp())
        results[f"sharded, {name}"] = train([row.active()], Sharded(**row.options), [rank], max_epochs=1, **sharded())
    for names in [*PAIRS, *SETS]:
        order = 1 if rank else -1  # the ranks list the callbacks in opposite orders
        results[" + ".join(names)] = train_three_steps(active_callbacks(names)[::order], names, [rank], **ddp())
    everything = [name for name, row in ROWS.items() if not row.options]
    results["accumulated"] = train(active_callbacks(everything), Digits(), [rank], accumulate_grad_batches=2, **ddp())
    for kind, full_checkpoint in (("sharded checkpoint", False), ("full checkpoint", True)):
        results[kind] = train_and_resume(folder / kind, rank, full_checkpoint)
    tensor_parallel = {"strategy": ModelParallelStrategy(1, 2), "devices": 2}
    results["tensor parallel"] = train(active_callbacks(TENSOR_PARALLEL), Parallel(), [0], max_epochs=1, **tensor_parallel)
    torch.save(results, folder / f"{rank}.pt")


TENSOR_PARALLEL = [name for name, row in ROWS.items() if "tensor_parallel" not in row.exempt and not row.options]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
