"""One of two ranks that share a device over gloo: the GPU if there is one, else the CPU.

Started by ``test_cuda.py`` through ``torch.distributed.run``. Each rank acts as its own node, so that
Lightning lets both use the same device.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from distributed_worker import Digits, batches
from helpers import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from table import everything


def main(folder: Path) -> None:
    """Train with one of each callback and save the weights."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(rank))
    options = {**QUIET, "accelerator": "auto", "max_epochs": 1, "num_nodes": 2, "use_distributed_sampler": False}
    model = Digits()
    trainer = Trainer(**options, strategy=DDPStrategy(process_group_backend="gloo"), callbacks=everything())
    trainer.fit(model, batches([rank]))
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    torch.save({"weights": weights, "device": str(trainer.strategy.root_device)}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
