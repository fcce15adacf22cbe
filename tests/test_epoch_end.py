"""What happens at the end of an epoch: exactly once, after its last batch, before its validation and its checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, digits, fit, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg import RandomShrinkage, Steps, WeightPruning, sparsity

pytestmark = pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")


class Counts(RandomShrinkage):
    """Remembers after how many batches an epoch ended."""

    def __init__(self):
        super().__init__(0.0, every="epoch")
        self.ends = []

    def attach(self, trainer, pl_module):
        super().attach(trainer, pl_module)
        self.trainer = trainer

    def epoch_end(self, params, step):
        self.ends.append(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)


class Watched(Classifier):
    """Keeps the sparsity that each validation sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and batch_idx == 0:
            self.seen.append(sparsity(self).fraction)

    def val_dataloader(self):
        return loader(32)


class FromIterator(Watched):
    """Fetches batches itself."""

    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(zip(*digits(64), strict=True))


def unsized():
    return DataLoader(Unsized(), batch_size=16)


class Skips(Watched):
    """Skips the rest of each epoch at its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if batch_idx == 2 else None


class Stops(Callback):
    """Stops training in the second epoch, in any hook with a trainer."""

    def __init__(self, hook):
        def stop(trainer, *args, **kwargs):
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 6:
                trainer.should_stop = True

        setattr(self, hook, stop)


class StopsItself(Watched):
    def training_step(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx == 5:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Interrupts(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx == 5:
            raise KeyboardInterrupt


HALF = Steps([0.0, 0.5], at=["1ep"])


@pytest.mark.parametrize("validates", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("data", [loader, unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("model", [Watched, FromIterator])
def test_epoch_ends_once(model, data, accumulation, validates):
    counts, trained = Counts(), model()
    limits = {} if validates else {"limit_val_batches": 0}
    fit([WeightPruning(HALF), counts], trained, data(), accumulate_grad_batches=accumulation, **limits)
    assert len(counts.ends) == 2
    if not (model is FromIterator and data is unsized):  # Lightning counts a batch that is not there
        assert counts.ends == [4, 8]
        assert trained.seen == ([0.5, 0.5] if validates else [])
    assert sparsity(trained).fraction == 0.5


def test_epoch_ends_without_validation_in_each():
    counts, trained = Counts(), Watched()
    fit([WeightPruning(HALF), counts], trained, max_epochs=4, check_val_every_n_epoch=2)
    assert (counts.ends, trained.seen) == ([4, 8, 12, 16], [0.5, 0.5])


def test_epoch_ends_once_if_validated_often():
    counts, trained = Counts(), Watched()
    fit([WeightPruning(HALF), counts], trained, val_check_interval=0.25)
    assert (counts.ends, trained.seen) == ([4, 8], [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_epoch_ends_if_its_rest_is_skipped():
    counts, trained = Counts(), Skips()
    fit([WeightPruning(HALF), counts], trained, max_epochs=3)
    assert counts.ends == [3, 6, 9]
    fit([WeightPruning(HALF)], trained := Skips(), max_epochs=1)
    assert sparsity(trained).fraction == 0.5  # one epoch is done, though not its batches


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end", "training_step"])
def test_epoch_that_stops_early_ends_before_its_validation(hook, first):
    counts = Counts()
    trained = StopsItself() if hook == "training_step" else Watched()
    others = [] if hook == "training_step" else [Stops(hook)]
    ours = [WeightPruning(Steps([0.0, 0.25, 0.5], at=["1ep", "2ep"])), counts]
    fit([*others, *ours] if first else [*ours, *others], trained, max_epochs=5)
    assert (counts.ends, trained.seen) == ([4, 6], [0.25, 0.5])


def test_epoch_goes_on_where_training_may_not_stop_yet():
    counts, trained = Counts(), Watched()
    fit([Stops("on_train_batch_end"), WeightPruning(HALF), counts], trained, min_epochs=3, max_epochs=5)
    assert (counts.ends, trained.seen) == ([4, 8, 12], [0.5, 0.5, 0.5])


def test_max_steps_in_mid_epoch_does_not_end_it():
    counts, trained = Counts(), Watched()
    fit([counts], trained, max_epochs=-1, max_steps=6)
    assert counts.ends == [4]
    fit([counts := Counts()], Watched(), max_epochs=-1, max_steps=8)
    assert counts.ends == [4, 8]


def test_interrupt_in_mid_epoch_does_not_end_it():
    counts = Counts()
    with pytest.raises(SystemExit):
        fit([Interrupts(), counts], Watched())
    assert counts.ends == [4]


@pytest.mark.parametrize("model", [Watched, FromIterator, Skips])
@pytest.mark.parametrize("data", [loader, unsized], ids=["sized", "unsized"])
def test_checkpoints_hold_what_the_epoch_ends_with(model, data, tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([saved, WeightPruning(HALF)], model(), data(), enable_checkpointing=True)
    for epoch in (0, 1):
        copy = Classifier()
        copy.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
        assert sparsity(copy).fraction == 0.5
