"""The hidden callback that lets values change before any other callback looks at them, and leaves no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import QUIET, Classifier, Memory, fit, loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from torch.optim import optimizer

from lightning_reg import (
    DropoutInjection,
    GradientNoise,
    L1Penalty,
    Linear,
    MaxNorm,
    WeightDecay,
    WeightDecayScheduler,
    WeightPruning,
)
from lightning_reg._engine import _lightning
from lightning_reg._engine.front import Front


class Decayed(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.5)


@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
def test_other_callbacks_see_the_values_that_act(first):
    logger = Memory()
    callbacks = [LearningRateMonitor(log_weight_decay=True), WeightDecayScheduler(Linear(0.0, 0.8))]
    fit(callbacks if first else callbacks[::-1], Decayed(), logger=logger, log_every_n_steps=1)
    logged = [metrics["lr-SGD-weight_decay"] for metrics in logger.steps.values() if "lr-SGD-weight_decay" in metrics]
    assert logged == pytest.approx([i / 10 for i in range(8)])


@pytest.mark.parametrize("position", [0, 1])
def test_values_are_in_place_before_any_other_hook_of_the_batch(position):
    penalty, seen = L1Penalty(Linear(0.0, 1.0)), []

    class Looks(Callback):
        def on_train_batch_start(self, *args):
            seen.append(penalty.current["strength"])

    callbacks = [Looks()]
    callbacks.insert(position, penalty)
    fit(callbacks)
    assert seen == [i / 8 for i in range(8)]


class Raises(Callback):
    """Raises an exception in one hook."""

    def __init__(self, hook, exception):
        def fail(*args, **kwargs):
            raise exception

        setattr(self, hook, fail)


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


@pytest.mark.parametrize("hook", [None, *HOOKS])
@pytest.mark.parametrize("exception", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("first", [True, False], ids=["listed before", "listed after"])
def test_list_of_callbacks_is_as_before(hook, exception, first):
    others = [Raises(hook, exception)] if hook else []
    trainer = Trainer(
        **QUIET, max_epochs=1, callbacks=[*(others if first else []), L1Penalty(Linear(0.0, 0.1)), *others[first:]]
    )
    callbacks, contents = trainer.callbacks, list(trainer.callbacks)
    for _ in range(2):
        try:
            trainer.fit(Validated(), loader(), loader(32))
        except (RuntimeError, SystemExit, KeyboardInterrupt):
            assert hook
        else:
            assert not hook
        assert trainer.callbacks is callbacks
        assert trainer.callbacks == contents
        trainer.fit_loop.max_epochs += 1


def test_list_of_callbacks_is_as_before_if_another_callback_fails_twice():
    fails = Raises("on_train_batch_start", RuntimeError("stop"))
    fails.on_exception = fails.on_train_batch_start
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[fails, L1Penalty(0.1), DropoutInjection(0.3, after="ReLU")])
    callbacks, model = trainer.callbacks, Classifier()
    with pytest.raises(RuntimeError):
        trainer.fit(model, loader())
    assert trainer.callbacks is callbacks
    assert not optimizer._global_optimizer_post_hooks
    assert not model.net[2]._forward_hooks
    assert "optimizer_step" not in vars(trainer.strategy)


def test_changes_of_the_list_in_a_fit_stay():
    class Changes(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.callbacks.append(added)
            trainer.callbacks.remove(removed)

    added, removed, changes, penalty = Callback(), Callback(), Changes(), L1Penalty(0.1)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[penalty, changes, removed])
    trainer.fit(Classifier(), loader())
    assert trainer.callbacks == [penalty, changes, added]


def test_checkpoint_has_no_entry(tmp_path):
    penalty = L1Penalty(Linear(0.0, 0.1))
    fit([penalty, ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.split("{")[0] for key in saved["callbacks"]} == {"L1Penalty", "ModelCheckpoint"}


class Duplicates(Callback):
    """Duplicates the other callbacks in the third batch."""

    def __init__(self, pickled):
        self.pickled, self.duplicates = pickled, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            others = [cb for cb in trainer.callbacks if cb is not self]
            self.duplicates = pickle.loads(pickle.dumps(others)) if self.pickled else copy.deepcopy(others)


@pytest.mark.parametrize("pickled", [False, True], ids=["copied", "pickled"])
def test_callbacks_can_be_duplicated_during_a_fit(pickled):
    penalty, duplicates = WeightDecay(Linear(0.0, 0.1)), Duplicates(pickled)
    fit([Callback(), penalty, GradientNoise(0.1), MaxNorm(1.0), WeightPruning(0.5), duplicates])
    front, _, again, *others = duplicates.duplicates
    assert isinstance(front, Front)
    fit([again, *others])  # they serve another fit
    assert again.current == penalty.current


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copied", "pickled"]
)
def test_copy_of_a_wrapped_object_has_its_own_method(duplicate):
    owner, calls = Counter(), []
    restore = _lightning.wrap_method(owner, "count", lambda count: lambda: (calls.append("wrapped"), count())[1])
    again = duplicate(owner)
    assert (again.count(), again.n, owner.n, calls) == (1, 1, 0, [])
    assert (owner.count(), again.n, owner.n, calls) == (1, 1, 1, ["wrapped"])
    restore()
    assert (owner.count(), calls) == (2, ["wrapped"])


class Counter:
    n = 0

    def count(self):
        self.n += 1
        return self.n


def test_callbacks_act_again_after_a_finder_in_mid_fit(tmp_path):
    finder = LearningRateFinder(num_training_steps=3, min_lr=1e-5, max_lr=1e-3)
    penalty, seen = L1Penalty(Linear(0.0, 1.0)), []

    class Looks(Callback):
        def on_train_batch_end(self, *args):
            seen.append(penalty.current["strength"])

    trainer = Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=2, callbacks=[penalty, finder, Looks()])
    callbacks = trainer.callbacks
    trainer.fit(Classifier(), loader())
    assert seen == [i / 8 for i in range(8)]
    assert trainer.callbacks is callbacks


@pytest.mark.parametrize("first", [True, False])
def test_there_is_a_hidden_callback_only_if_another_one_is_first(first):
    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.found = any(isinstance(callback, Front) for callback in trainer.callbacks)

    looks, penalty = Looks(), L1Penalty(0.1)
    fit([penalty, looks] if first else [looks, penalty], max_epochs=1)
    assert looks.found is not first


def test_a_callback_that_another_one_puts_first_finds_the_value_of_its_step():
    class PutsFirst(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.callbacks = [looks, *trainer.callbacks]

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(penalty.current["strength"])

    seen, looks, penalty = [], Looks(), L1Penalty(Linear(0.0, 8.0))
    fit([penalty, PutsFirst()], max_epochs=2)
    assert seen == [float(step) for step in range(8)]
