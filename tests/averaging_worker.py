"""One rank of runs whose replicas differ, and are averaged after every second step: post-local SGD. It saves the weights.

Started by ``test_averaging.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from distributed_worker import Digits, train
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import new_subgroups
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from lightning_reg import UnitNorm, WeightPruning

PERIOD, UNITS, PRUNED = 2, "net.1.weight", "net.4.weight"


class Local(DDPStrategy):
    """DDP that reduces no gradient, so that replicas differ.

    Args:
        averages: Whether Lightning averages the replicas; otherwise an optimizer does.
    """

    def __init__(self, averages: bool) -> None:
        super().__init__(process_group_backend="gloo", model_averaging_period=PERIOD)
        self.averages = averages

    def _register_ddp_hooks(self) -> None:
        """Register the hook on the CPU too."""
        state = PostLocalSGDState(None, new_subgroups(1)[0], start_localSGD_iter=0, post_local_gradient_allreduce=False)
        self.model.register_comm_hook(state, post_localSGD_hook)
        self._ddp_comm_state = state if self.averages else None


class Averaged(Digits):
    """With an optimizer that averages the replicas. It takes no closure, so that Lightning cannot call it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        from torch.distributed.optim import PostLocalSGDOptimizer  # which warns when it is imported

        optimizer = super().configure_optimizers()
        wrapped = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(PERIOD, warmup_steps=0))
        wrapped.defaults = optimizer.defaults  # Lightning asks for them
        return wrapped


class Deviation(Callback):
    """Keeps by how much the norm of a unit differs from 1 after each step, at most."""

    def __init__(self) -> None:
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        norms = pl_module.get_parameter(UNITS).detach().norm(dim=1)
        self.largest.append((norms - 1).abs().max().item())


def callbacks() -> list[Callback]:
    """Return a constraint and masks that an average breaks."""
    return [UnitNorm(params=UNITS), WeightPruning(0.5, params=PRUNED)]


def run(given: list[Callback], model: Digits, averages: bool, rank: int, epochs: int = 3) -> dict[str, Tensor]:
    odd = {"max_epochs": epochs, "limit_train_batches": 5}  # since the averages come after the steps 1, 3, 5, …
    options: dict[str, Any] = {"strategy": Local(averages), "devices": 2, **odd}
    return train(given, model, [rank], **options)


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    deviations = {kind: Deviation() for kind in ("strategy", "optimizer")}
    results: dict[str, Any] = {
        "strategy": run([*callbacks(), deviations["strategy"]], Digits(), True, rank),
        "optimizer": run([*callbacks(), deviations["optimizer"]], Averaged(), False, rank),
        "plain": run([], Digits(), True, rank),
        "apart": run([], Digits(), False, rank),
    }
    results |= {f"{kind}, deviations": deviation.largest for kind, deviation in deviations.items()}
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
