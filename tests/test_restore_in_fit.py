"""A restore in mid-fit, as Lightning's finders do it: they save a checkpoint, train on trial, and restore the checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers import QUIET, Classifier, loader, same
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from table import ROWS, Row

from lightning_reg import Linear, WeightPruning
from lightning_reg._engine.regularizer import regularizers_of

FINDERS = "ignore:.*(does not have many workers|`weights_only` was not set|batch_size|deprecated|You're resuming)"
pytestmark = pytest.mark.filterwarnings(FINDERS)


class Finds(LearningRateFinder):
    """Runs where Lightning's documentation does. The rate that it finds is not used."""

    def __init__(self, epochs):
        super().__init__(num_training_steps=6, early_stop_threshold=None)
        self.epochs = epochs

    def on_fit_start(self, trainer, pl_module):
        """Does nothing: it runs later."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            found = [group["lr"] for group in trainer.optimizers[0].param_groups]
            self.lr_find(trainer, pl_module)
            pl_module.lr = 0.05
            for group, rate in zip(trainer.optimizers[0].param_groups, found, strict=True):
                group["lr"] = rate


class Scales(BatchSizeFinder):
    """Runs where Lightning's documentation does. The size that it finds is not used."""

    def __init__(self, epochs):
        super().__init__(init_val=16, max_trials=1, steps_per_trial=2)
        self.epochs = epochs

    def on_fit_start(self, trainer, pl_module):
        """Does nothing: it runs later."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            self.scale_batch_size(trainer, pl_module)
            pl_module.batch_size = 16
            trainer.fit_loop.restarting = trainer.fit_loop.epoch_loop.restarting = False  # as the other finder leaves them
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()


class Sized(Classifier):
    """The model with a loader whose batches have a size that can be found."""

    batch_size = 16

    def train_dataloader(self):
        return loader(64, self.batch_size)


def run(callback, finders, folder, **options):
    """Train three epochs; return the model and the callback's state after each epoch."""
    trained = Sized(**options)
    callbacks = [*finders, callback, states := States()]
    Trainer(**QUIET, default_root_dir=folder, max_epochs=3, callbacks=callbacks).fit(trained)
    return trained, states.states


class States(Callback):
    """Keeps the states of the regularizers after each epoch."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append([cb.state_dict() for cb in regularizers_of(trainer)])


def flat(state):
    """Return the entries of nested containers in order, with tensors as lists."""
    if isinstance(state, dict):
        return [entry for key in sorted(state, key=str) for entry in [key, *flat(state[key])]]
    if isinstance(state, list | tuple):
        return [entry for value in state for entry in flat(value)]
    return [str(state.tolist() if isinstance(state, torch.Tensor) else state)]  # NaN differs from itself


REWINDS = Row(lambda: WeightPruning(Linear(0.0, 0.6), rewind_to_step=3), None, None, None, None)
STEPS = Row(
    lambda: WeightPruning({"net.0.*": Linear(0.0, 0.6), "net.4.*": 0.3}, every="3st", keep_zeros=True), None, None, None, None
)
CASES = {**ROWS, "rewinding": REWINDS, "pruning by steps": STEPS}


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in CASES.items()])
def test_restore_in_mid_fit_changes_nothing(row, tmp_path):
    """Neither the weights nor the state after any epoch differs from a run without finders."""
    make = row.scheduled or row.active
    expected, expected_states = run(make(), [], tmp_path, **row.options)
    found, states = run(make(), [Finds((0, 2)), Scales((1,))], tmp_path, **row.options)
    assert same(found, expected)
    assert flat(states) == flat(expected_states)
