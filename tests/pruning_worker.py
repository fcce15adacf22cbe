"""One rank of a distributed run that prunes the digits model in several ways and saves the results.

Started by ``test_distributed_pruning.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_worker import Digits, Sharded, batches, ddp, full_tensor, masks_of, sharded, train
from helpers import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_reg import Cubic, Linear, WeightPruning

SHARDED: dict[str, dict[str, Any]] = {
    "min_kept": {"sparsity": 0.6, "min_kept": 0.35},
    "min_kept in each layer": {"sparsity": 0.6, "min_kept": 0.3, "scope": "layer"},
    "min_kept of units": {"sparsity": 0.5, "min_kept": 0.4, "structure": "unit", "params": "weights"},
    "patterns": {"sparsity": {"net.1.*": 0.8, "net.[46].*": 0.3}},
}
"""Settings of pruning under FSDP2 that equal those of one process."""

REWINDS: dict[str, Any] = {"pruned": {}, "rewound": {"rewind_to_step": 1}}


class WithAdam(Digits):
    """The digits model with Adam, whose state pruning and rewinding clear."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class WithZero(Digits):
    """The same, with the state of each parameter on one rank only."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=0.01)


class ShardedAdam(Sharded):
    """The sharded digits model with an optimizer that has state from its first step on, or from its creation."""

    kind: type[torch.optim.Optimizer] = torch.optim.Adam

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind(self.parameters(), lr=0.01)


class ShardedAdagrad(ShardedAdam):
    """The same, with state that exists before the first step."""

    kind = torch.optim.Adagrad


class ShardedValidated(ShardedAdam):
    """The same, with a validation, after which gradients are removed."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Computes nothing."""

    def val_dataloader(self) -> Any:
        return batches([0])


class ShardedZeros(Sharded):
    """The sharded digits model with small weights of 0, as loaded from a pruned model."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.data[p.data.abs() < 0.04] = 0.0


RESUMED = {"Sharded": Sharded, "Adam": ShardedAdam, "Adagrad": ShardedAdagrad, "validated": ShardedValidated}
EVERY = ("1ep", "3st")
LAYOUTS = ("full", "distributed")


def rewound(every: str) -> WeightPruning:
    """Return a callback that prunes at each epoch's end, or right after steps."""
    return WeightPruning(Linear(0.1, 0.6), every=every, rewind_to_step=2)


def resumable(layout: str) -> dict[str, Any]:
    """Return trainer arguments for one rank of FSDP2 that saves checkpoints of a layout."""
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=layout == "distributed")
    return {"strategy": strategy, "devices": 2, "max_epochs": 3, "enable_checkpointing": True}


def run(name: str, every: str, layout: str, rank: int, folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """Train with checkpoints at each epoch's end; return the weights."""
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    model, options = RESUMED[name](), {**QUIET, "use_distributed_sampler": False, **resumable(layout)}
    Trainer(**options, callbacks=[rewound(every), saves]).fit(model, batches([rank]), ckpt_path=resume)
    return {name: full_tensor(p) for name, p in model.named_parameters()}


def cases() -> list[tuple[str, str, str]]:
    """Return the model, the times of pruning, and the layout of each run that is resumed."""
    layouts = [(name, "1ep", layout) for name in RESUMED for layout in LAYOUTS]
    return [*layouts, ("Adam", "3st", "full")]


def main(folder: Path, resumes: bool) -> None:
    """Train all variants, or resume those that saved checkpoints, and save the results of this rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    for case in cases():
        checkpoints = folder / "-".join(case)
        resume, where = (checkpoints / "epoch=0.ckpt", checkpoints / "again") if resumes else (None, checkpoints)
        results["-".join(case)] = run(*case, rank, where, resume)
    if not resumes:
        for name, options in REWINDS.items():
            for model in (WithAdam, WithZero):
                pruning = WeightPruning(Cubic(0.0, 0.8), **options)
                results[f"{name}, {model.__name__}"] = train([pruning], model(), [rank], **ddp())
        for name, options in SHARDED.items():
            results[f"masks, {name}"] = masks_of(Sharded(), options, [rank], **sharded())
        for grown in (0.0, 0.6):
            results[f"zeros, {grown}"] = train([WeightPruning(grown, keep_zeros=True)], ShardedZeros(), [rank], **sharded())
        for name in RESUMED:
            results[f"unsaved, {name}"] = train([rewound("1ep")], RESUMED[name](), [rank], **sharded(), max_epochs=3)
    torch.save(results, folder / f"{'resumed ' * resumes}{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), resumes="resume" in sys.argv)
