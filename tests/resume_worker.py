"""A process that resumes training with each callback of the table from checkpoints of another process.

Started by ``test_resume.py``.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from helpers import QUIET, Classifier, digits
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from table import ROWS, SETS, everything
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_reg import Linear, WeightPruning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from lightning_reg._engine.regularizer import Regularizer

EPOCHS = 3
STEPS = (4, 6)  # at the end of an epoch of 4 steps, and mid-epoch
VARIANTS: dict[str, Callable[[], Regularizer]] = {
    "lottery ticket": lambda: WeightPruning(Linear(0.0, 0.6), rewind_to_step=3),
    "random units": lambda: WeightPruning(Linear(0.0, 0.6), criterion="random", structure="unit", params="weights"),
    "every third step": lambda: WeightPruning(
        {"net.0.*": Linear(0.0, 0.6), "net.4.*": 0.3}, every="3st", rewind_to_step=2, keep_zeros=True
    ),
    "every second epoch": lambda: WeightPruning(0.5, every="2ep", rewind_to_step=5),
}
MIXED = {" + ".join(names): names for names in SETS}
NAMES = [*ROWS, "everything", *VARIANTS, *MIXED]


class Resumable(DataLoader[Any]):
    """A loader that saves its position, as mid-epoch checkpoints need."""

    def __init__(self, dataset: Dataset[Any] | None = None, **options: Any) -> None:
        super().__init__(dataset or TensorDataset(*digits(64)), **(options or {"batch_size": 16}))
        self.position = self.skipped = 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self.skipped = self.skipped, 0
        for batch in itertools.islice(super().__iter__(), self.position, None):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["position"] % len(self)


def train(name: str, folder: Path, resume: Path | None = None) -> dict[str, Tensor]:
    """Train to the end and save checkpoints in a folder; resume from a checkpoint if one is given."""
    callbacks = _callbacks(name)
    options = ROWS[name].options if name in ROWS else {}
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    model = Classifier(**options)
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=EPOCHS, callbacks=[*callbacks, checkpoints])
    trainer.fit(model, Resumable(), ckpt_path=resume)
    return dict(model.state_dict())


def _callbacks(name: str) -> list[Regularizer]:
    if name == "everything":
        return everything()
    if name in VARIANTS:
        return [VARIANTS[name]()]
    if name in MIXED:
        return [ROWS[row].active() for row in MIXED[name]]
    return [(ROWS[name].scheduled or ROWS[name].active)()]


def main(folder: Path) -> None:
    """Resume every run from every checkpoint and save the final weights."""
    torch.set_num_threads(1)
    for name, step in itertools.product(NAMES, STEPS):
        weights = train(name, folder / "resumed" / name, folder / name / f"step={step}.ckpt")
        torch.save(weights, folder / name / f"resumed_{step}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
