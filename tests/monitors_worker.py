"""One rank of fits with and without ``OverfittingMonitor``. Started by ``test_monitors_distributed.py``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from distributed_worker import Digits, Sharded, full_tensor
from helpers import QUIET, Memory, digits, seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import OverfittingMonitor


class Logs:
    """Mixin for a model that logs a loss and a torchmetrics metric."""

    def configure_model(self) -> None:
        """Shard batch normalization too, because FSDP2 does not average the gradients of other parameters over the ranks."""
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net[2], mesh=self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Average the running statistics of the ranks, so that a sample has the same value on each of them."""
        for buffer in self.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= torch.distributed.get_world_size()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0].view(-1, 8, 8))
        self.log("val/loss", cross_entropy(logits, batch[1]), sync_dist=True)
        self.accuracy(logits, batch[1])
        self.log("val/accuracy", self.accuracy)


def model_of(kind: type) -> Any:
    """Return a model with batch normalization."""
    model = kind()
    model.net[2] = nn.Sequential(nn.BatchNorm1d(32), model.net[2])
    model.accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
    model.__class__ = type(kind.__name__, (Logs, kind), {})
    return model


def loader(first: int, last: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of digits with their numbers."""
    images, labels = digits(last)
    return DataLoader(TensorDataset(images[first:], labels[first:], torch.arange(first, last)), batch_size=16, **options)


def train(monitors: list[OverfittingMonitor], kind: type, strategy: Any) -> dict[str, Any]:
    """Train, and return everything that a monitor must not change."""
    seed(0)
    model, memory = model_of(kind), Memory()
    trainer = Trainer(
        **{**QUIET, "devices": 2, "max_epochs": 2, "logger": memory, "log_every_n_steps": 1},
        strategy=strategy,
        callbacks=monitors,
    )
    trainer.fit(model, loader(0, 211, shuffle=True), loader(1000, 1303))
    logged = {step: {k: metrics[k] for k in sorted(metrics) if "reg/" not in k} for step, metrics in memory.steps.items()}
    return {
        "state": {name: full_tensor(tensor) for name, tensor in model.state_dict().items()},
        "logged": logged,
        "random": torch.get_rng_state(),
        "points": [list(point) for monitor in monitors for point in monitor.points],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "batches": [len(sample.indices) for sample in SAMPLES],
    }


SAMPLES: list[Any] = []


class Watched(OverfittingMonitor):
    """Keeps its samples for the test."""

    def data_ready(self) -> None:
        super().data_ready()
        SAMPLES[:] = self._samples.values()


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test, on which the order of the samples would depend
    warnings.simplefilter("ignore")
    results = {}
    for name, kind, strategy in (
        ("DDP", Digits, lambda: DDPStrategy(process_group_backend="gloo")),
        ("FSDP2", Sharded, lambda: ModelParallelStrategy(2, 1)),
    ):
        results[f"{name}, plain"] = train([], kind, strategy())
        accuracy = OverfittingMonitor(metric="val/accuracy", mode="max", name="accuracy")
        monitors = [Watched(metric="val/loss", name="loss"), accuracy]
        results[name] = train(monitors, kind, strategy())
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
