"""One rank of a DDP run that is killed mid-epoch, or that resumes from a checkpoint of the killed run.

Started by ``test_killed.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from distributed_worker import Digits, batches, ddp
from helpers import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_worker import Resumable
from table import everything

if TYPE_CHECKING:
    from torch import Tensor

KILLED_AT = 9  # mid-epoch, since an epoch has 6 steps


class KillRank(Callback):
    """Kills one rank without time to clean up."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == KILLED_AT and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, rank: int, *others: Callback, resume: Path | None = None) -> dict[str, Tensor]:
    """Train for three epochs with one of each callback, and save a checkpoint after every second step."""
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "use_distributed_sampler": False, **ddp()}
    data = Resumable(batches([rank]).dataset, batch_sampler=batches([rank]).batch_sampler)
    model = Digits()
    Trainer(**options, callbacks=[*everything(), *others, saves]).fit(model, data, ckpt_path=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def main(folder: Path, kind: str) -> None:
    """Get killed, or train without interruption and resume the killed run; save the weights of both."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    if kind == "killed":
        train(folder / "killed", rank, KillRank())
    last = max((folder / "killed").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    results = {
        "uninterrupted": train(folder / "uninterrupted", rank),
        "resumed": train(folder / "resumed", rank, resume=last),
        "from": last.name,
    }
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
