"""Metrics in Lightning's own rows, and those of an epoch's end, which other callbacks monitor."""

from __future__ import annotations

import csv

import pytest
import torch
from helpers import QUIET, Classifier, Memory, fit, loader, same
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from lightning_reg import L1Penalty, Linear, RandomShrinkage, WeightPruning, sparsity

PRUNED, TARGET = "reg/WeightPruning/pruned", "reg/WeightPruning/sparsity"
SIXTHS = {1: 0.2, 2: 0.4, 3: 0.6}
DEFAULT = {"log_every_n_steps": 50}  # Lightning's own, with four batches per epoch
pytestmark = pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")


class Validated(Classifier):
    """Logs a loss in training and in validation, as most models do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def val_dataloader(self):
        return loader(32)


class Silent(Classifier):
    """Logs nothing."""


def train(callbacks, model, **options):
    """Train three epochs of four batches with a growing sparsity; return the trainer."""
    pruning = WeightPruning(Linear(0.0, 0.6))
    trainer = Trainer(**{**QUIET, **DEFAULT, "max_epochs": 3, **options}, callbacks=[*callbacks, pruning])
    trainer.fit(model, loader())
    return trainer


@pytest.mark.parametrize("logs", [True, False], ids=["logger", "no logger"])
@pytest.mark.parametrize("kind", [Validated, Silent])
@pytest.mark.parametrize("saves_after_training", [None, True])
def test_checkpoints_monitor_the_sparsity_of_each_epoch(kind, logs, saves_after_training, tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path,
        monitor=PRUNED,
        mode="max",
        save_top_k=-1,
        filename="{" + PRUNED + ":.2f}",
        auto_insert_metric_name=False,
        save_on_train_epoch_end=saves_after_training,
    )
    train([checkpoint], kind(), enable_checkpointing=True, logger=Memory() if logs else False)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["0.20.ckpt", "0.40.ckpt", "0.60.ckpt"]
    saved = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
    zeros = sum(int((saved[f"net.{i}.weight"] == 0).sum()) for i in (0, 4))
    assert zeros == round(0.6 * (1024 + 160))


@pytest.mark.parametrize("kind", [Validated, Silent])
def test_early_stopping_monitors_the_sparsity_of_each_epoch(kind):
    stopping = EarlyStopping(PRUNED, mode="max", stopping_threshold=0.39, check_on_train_epoch_end=kind is Silent)
    model = kind()
    assert train([stopping], model).current_epoch == 2
    assert sparsity(model).fraction == pytest.approx(0.4, abs=1e-3)


def test_sparsity_is_known_to_callbacks_in_validation_and_after_the_epoch():
    seen = []

    class Looks(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append((trainer.callback_metrics[PRUNED].item(), trainer.callback_metrics[TARGET].item()))

        on_train_epoch_end = on_validation_end

    train([Looks()], Validated())
    assert [pruned for pruned, _ in seen] == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6], abs=1e-3)
    assert [target for _, target in seen] == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6])


def test_sparsity_is_known_between_logged_steps():
    """From the start of the fit on, and right after each pruning: a checkpoint that monitors it must find it at any time."""
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(trainer.callback_metrics[PRUNED].item())

        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.callback_metrics[PRUNED].item())

    callbacks = [Looks(), WeightPruning(Linear(0.0, 0.6, until="6st"), every="3st")]
    fit(callbacks, Validated(), **DEFAULT, logger=Memory())
    assert seen == pytest.approx([0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.6], abs=1e-3)


def test_checkpoints_monitor_the_sparsity_within_an_epoch(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor=PRUNED, mode="max", save_top_k=-1, filename="{step}")
    callbacks = [checkpoint, WeightPruning(Linear(0.0, 0.6, until="6st"), every="3st")]
    options = {"max_epochs": -1, "max_steps": 6, "val_check_interval": 2, "enable_checkpointing": True}
    fit(callbacks, Validated(), loader(16 * 100), **options)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert checkpoint.best_model_score == pytest.approx(0.6, abs=1e-3)


def test_shrinkage_after_an_epoch_is_known():
    trainer = Trainer(**QUIET, **DEFAULT, max_epochs=1, callbacks=[RandomShrinkage(0.1, every="epoch"), L1Penalty(0.1)])
    trainer.fit(Classifier(), loader())
    assert dict(trainer.callback_metrics) == {"reg/RandomShrinkage/epsilon": pytest.approx(0.1)}


def rows(folder):
    """Return the rows of a CSV file, without empty fields."""
    with next(folder.rglob("metrics.csv")).open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_rows_of_epochs_join_those_of_the_module(tmp_path):
    train([], Validated(), logger=CSVLogger(tmp_path))
    found = [row for row in rows(tmp_path) if PRUNED in row]
    assert [(row["epoch"], row["step"]) for row in found] == [(0, 3), (1, 7), (2, 11)]
    assert [row[PRUNED] for row in found] == pytest.approx(list(SIXTHS.values()), abs=1e-3)
    assert all("val_loss" in row for row in found)


def test_rows_of_steps_join_those_of_the_module(tmp_path):
    train([L1Penalty(0.1)], Validated(), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    mine = [row for row in rows(tmp_path) if "reg/L1Penalty/strength" in row]
    assert [(row["epoch"], row["step"]) for row in mine] == [(step // 4, step) for step in (1, 3, 5, 7, 9, 11)]
    assert all("train_loss_step" in row for row in mine)
    assert all(len([row for row in rows(tmp_path) if row["step"] == step and "train_loss_step" in row]) == 1 for step in (1, 3))


def test_rows_of_a_module_that_logs_nothing_have_the_epoch(tmp_path):
    train([], Silent(), logger=CSVLogger(tmp_path), log_every_n_steps=4)
    assert [(row["epoch"], row["step"]) for row in rows(tmp_path)] == [(0, 3), (1, 7), (2, 11)]


def test_rows_with_a_step_of_the_module_are_left_alone():
    class Counts(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"loss": loss, "step": 100.0 + self.global_step})
            return loss

    logger = Memory()
    fit([L1Penalty(0.1)], Counts(), logger=logger, log_every_n_steps=1, max_epochs=1)
    assert "loss" in logger.steps[100]
    assert "reg/L1Penalty/strength" not in logger.steps[100]
    assert logger.steps[0]["reg/L1Penalty/strength"] == pytest.approx(0.1)
    assert logger.steps[0]["epoch"] == 0


def test_rows_under_accumulation_and_of_validation_batches():
    class Steps(Validated):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]), on_step=True, on_epoch=False)

    logger = Memory()
    train([], Steps(), logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    assert [step for step, metrics in sorted(logger.steps.items()) if PRUNED in metrics] == [0, 1, 2, 3, 4, 5]
    assert [logger.steps[step]["epoch"] for step in range(6)] == [0, 0, 1, 1, 2, 2]


def test_metrics_do_not_change_training_or_what_the_module_logs():
    class Plain(Callback):
        pass

    loggers = [Memory(), Memory()]
    models = [
        fit(callbacks, Validated(), logger=logger, log_every_n_steps=1)
        for callbacks, logger in (([WeightPruning(0.0)], loggers[0]), ([Plain()], loggers[1]))
    ]
    assert same(*models)
    mine = {step: {k: v for k, v in row.items() if not k.startswith("reg/")} for step, row in loggers[0].steps.items()}
    assert mine == loggers[1].steps


def test_the_trainer_is_left_as_it_was():
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[WeightPruning(0.5)])
    before = set(vars(trainer._logger_connector))
    trainer.fit(Classifier(), loader())
    assert set(vars(trainer._logger_connector)) == before
