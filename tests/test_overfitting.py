"""``OverfittingMonitor``: what it measures, that it changes nothing, and what it says about mistakes."""

from __future__ import annotations

import copy
import itertools
import random
import re
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from helpers import QUIET, Classifier, Memory, digits, fit, loader, same, seed, traces
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from lightning_reg import L2Penalty, OverfittingMonitor
from lightning_reg.monitors.samples import BATCHES

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")


def part(first: int, last: int, batch_size: int = 16, **options) -> DataLoader:
    """Return a loader of some digits."""
    images, labels = digits(last)
    return DataLoader(TensorDataset(images[first:], labels[first:]), batch_size=batch_size, **options)


class Model(Classifier):
    """The model with a validation step that logs a loss, two accuracies, and an AUROC."""

    def __init__(self, **options):
        super().__init__(**options)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
        self.auroc = torchmetrics.classification.BinaryAUROC()
        self.several = torchmetrics.MetricCollection(
            {
                "val/macro": torchmetrics.classification.MulticlassAccuracy(10, average="macro"),
                "val/recall": torchmetrics.classification.MulticlassRecall(10, average="macro"),
            }
        )

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        self.log("val/loss", cross_entropy(logits, labels), prog_bar=True)
        self.log("val/plain", (logits.argmax(1) == labels).float().mean())
        self.accuracy.update(logits, labels)
        self.log("val/accuracy", self.accuracy)
        self.auroc(logits.softmax(1)[:, :5].sum(1), labels < 5)
        self.log("val/auroc", self.auroc)
        self.several.update(logits, labels)
        self.log_dict(self.several)


def run(callbacks, model=None, train=None, val=None, max_epochs=3, **options):
    """Train from a fixed state of the random numbers; return the model and its trainer."""
    seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = Model() if model is None else model
    trainer = Trainer(**{**QUIET, "max_epochs": max_epochs, "callbacks": callbacks, **options})
    train = part(0, 150, shuffle=True) if train is None else train
    trainer.fit(model, train, part(1000, 1300) if val is None else val)
    return model, trainer


def random_numbers():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def all_samples(model: nn.Module, first: int, last: int) -> float:
    """Return the loss over digits, by definition."""
    images, labels = digits(last)
    with torch.no_grad():
        return float(cross_entropy(model.eval().net(images[first:]), labels[first:]))


# What it measures ----------------------------------------------------------------------------------------------------


def test_values_are_those_of_the_samples():
    monitor = OverfittingMonitor(samples=10_000)
    model, trainer = run([monitor], max_epochs=2)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    train, val = all_samples(model, 0, 150), all_samples(model, 1000, 1300)
    assert found["reg/OverfittingMonitor/train"] == pytest.approx(train, rel=1e-5)
    assert found["reg/OverfittingMonitor/val"] == pytest.approx(val, rel=1e-5)
    assert found["reg/OverfittingMonitor/val"] == pytest.approx(found["val/loss"], rel=1e-5)
    assert found["reg/OverfittingMonitor/gap"] == pytest.approx(val - train, rel=1e-4)
    assert found["reg/OverfittingMonitor/gap_low"] < val - train < found["reg/OverfittingMonitor/gap_high"]
    assert [point.epoch for point in monitor.points] == [0, 1]


def test_gap_is_positive_if_accuracy_is_worse_on_validation_data():
    monitors = [OverfittingMonitor(metric=f"val/{name}", mode="max", name=name) for name in ("plain", "accuracy")]
    _, trainer = run(monitors, max_epochs=6)
    found = trainer.callback_metrics
    assert found["reg/plain/gap"] > 0
    assert found["reg/plain/gap"] == pytest.approx(float(found["reg/plain/train"] - found["reg/plain/val"]), abs=1e-6)
    for key in ("train", "val", "gap", "gap_low", "gap_high"):  # a torchmetrics metric is as good as a number
        assert found[f"reg/accuracy/{key}"] == pytest.approx(float(found[f"reg/plain/{key}"]), abs=1e-6)


@pytest.mark.parametrize("metric", ["val/auroc", "val/macro", "val/recall"])
def test_no_interval_for_what_is_no_mean(metric):
    monitor = OverfittingMonitor(metric=metric, mode="max", samples=10_000)
    _, trainer = run([monitor])
    found = trainer.callback_metrics
    name = "reg/OverfittingMonitor"
    assert float(found[f"{name}/val"]) == pytest.approx(float(found[metric]), abs=1e-5)
    assert f"{name}/gap_low" not in found
    assert str(monitor.verdict).startswith(
        "cannot tell: the gap has no interval, because the metric is not a mean over samples, or"
    )


def test_metric_that_cannot_merge_its_states():
    class Peak(torchmetrics.Metric):
        full_state_update = True

        def __init__(self):
            super().__init__()
            self.add_state("highest", torch.tensor(0.0), dist_reduce_fx="max")

        def update(self, values):
            self.highest = torch.maximum(self.highest, values.max())

        def compute(self):
            return self.highest

    class Peaked(Classifier):
        def __init__(self):
            super().__init__()
            self.peak = Peak()

        def validation_step(self, batch, batch_idx):
            self.peak(self.net(batch[0]))
            self.log("val/peak", self.peak)

    _, trainer = run([OverfittingMonitor(metric="val/peak", samples=10_000)], Peaked())
    found = trainer.callback_metrics
    assert float(found["reg/OverfittingMonitor/val"]) == pytest.approx(float(found["val/peak"]))
    assert "reg/OverfittingMonitor/gap_low" not in found


class Counting(Model):
    """Records the sizes of the batches of its validation step, and what it sees of the training."""

    def __init__(self):
        super().__init__()
        type(self).record = Record()  # the monitor looks into attributes of the instance

    def validation_step(self, batch, batch_idx):
        self.record.entries.append((len(batch[1]), self.net.training, self.trainer.validating, torch.is_grad_enabled()))
        super().validation_step(batch, batch_idx)


class Record:
    """An object in which a test keeps something."""

    def __init__(self):
        self.entries = []


@pytest.mark.parametrize(("samples", "batches"), [(2048, 22), (40, 20), (12, 12)])
def test_there_are_at_least_20_small_batches(samples, batches):
    model = Counting()
    run(
        [OverfittingMonitor(metric="val/loss", samples=samples)],
        model,
        val=part(1000, 1150),
        max_epochs=1,
        num_sanity_val_steps=0,
    )
    entries = model.record.entries[2 + 10 :]  # after a batch of each that is tried, and the validation
    assert len(entries) == 2 * batches
    assert {entry[1:] for entry in entries} == {(False, True, False)}
    assert sum(size for size, *_ in entries) == 2 * min(samples, 150)
    assert BATCHES == 20


def test_evaluates_the_weights_that_are_validated():
    """The average, which EMA puts in place for the validation, and not what is trained."""
    monitor = OverfittingMonitor(metric="val/loss", samples=10_000)
    _, trainer = run([EMAWeightAveraging(decay=0.9), monitor])
    found = trainer.callback_metrics
    assert float(found["reg/OverfittingMonitor/val"]) == pytest.approx(float(found["val/loss"]), rel=1e-5)


def test_only_the_last_validation_of_every_nth_epoch():
    class Times(OverfittingMonitor):
        def validated(self):
            before = len(self.state["curves"])
            super().validated()
            if len(self.state["curves"]) > before:
                times.append((self._trainer.current_epoch, self._trainer.global_step))

    for every, options, expected in [
        (1, {}, [(0, 10), (1, 20), (2, 30), (3, 40), (4, 50)]),
        (2, {}, [(0, 10), (1, 20), (3, 40)]),
        (1, {"val_check_interval": 4, "max_epochs": 2}, [(0, 8), (1, 18)]),
        (2, {"check_val_every_n_epoch": 2}, [(1, 20), (3, 40)]),
        (1, {"max_steps": 25, "val_check_interval": 5}, [(0, 10), (1, 20), (2, 25)]),
    ]:
        times = []
        run([Times(metric="val/loss", every_n_epochs=every)], **{"max_epochs": 5, **options})
        assert times == expected, (every, options)


# It changes nothing --------------------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Digits with random augmentations, from global generators and from generators of its own."""

    def __init__(self, first, last):
        self.images, self.labels = (tensor[first:] for tensor in digits(last))
        self.own = torch.Generator().manual_seed(1)
        self.transforms = [Jitter(np.random.default_rng(2)), Jitter(random.Random(3))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = torch.rand(64) + torch.rand(64, generator=self.own) + random.random() + np.random.rand()  # noqa: NPY002
        for transform in self.transforms:
            noise = transform(noise)
        return self.images[index] + 0.02 * noise, self.labels[index]


class Jitter:
    def __init__(self, rng):
        self.rng = rng

    def __call__(self, image):
        return image + self.rng.random()


class Normalized(Model):
    """With batch normalization, and a buffer that each forward pass changes."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16)
        self.net.append(Counter())


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        return x + 1e-3 * self.calls


def logged(memory: Memory, own: str = "reg/") -> dict:
    """Return what was logged, without the monitor's metrics."""
    return {step: {key: metrics[key] for key in sorted(metrics) if own not in key} for step, metrics in memory.steps.items()}


def noisy(first, last, **options):
    return DataLoader(Noisy(first, last), batch_size=16, **options)


class Counted(Dataset):
    """Digits with augmentations that depend on how often the dataset was asked, and with a cache."""

    def __init__(self, size=150):
        self.images, self.labels = digits(size)
        self.asked, self.cache = 0, {}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.asked += 1
        noise = self.cache.setdefault(index, self.asked % 7 + torch.rand(64))
        return self.images[index] + 0.01 * (self.asked % 5) + 0.02 * noise, self.labels[index]


class OfNoClass:
    """The same without a base class of torch."""

    __init__, __len__, __getitem__ = Counted.__init__, Counted.__len__, Counted.__getitem__


class Deep:
    """Digits with augmentations that depend on states of several kinds, all of which are changed in place."""

    def __init__(self):
        self.images, self.labels = digits(150)
        self.array, self.tensor = np.zeros(3), torch.zeros(3)
        self.nested, self.holder = {"seen": []}, SimpleNamespace(asked=0)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.array[1] += 1
        self.tensor[1] += 1
        self.nested["seen"].append(index)
        self.holder.asked += 1
        states = (self.array[1], self.tensor[1], len(self.nested["seen"]), self.holder.asked)
        return self.images[index] + sum(0.01 * (state % 7) for state in states), self.labels[index]


class Collates:
    """A collate function with a state."""

    def __init__(self):
        self.asked = 0

    def __call__(self, samples):
        self.asked += 1
        images, labels = default_collate(samples)
        return images + 0.01 * (self.asked % 7), labels


class Wrapped:
    """A sampler of no class of torch, which reads a dataset."""

    def __init__(self, dataset):
        self.dataset, self.sampler = dataset, Rotates()

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        assert self.dataset[0] is not None
        return iter(self.sampler)


def deep():
    dataset = Subset(Deep(), range(150))
    return DataLoader(dataset, batch_size=16, sampler=Wrapped(dataset), collate_fn=Collates())


class Batches(Counted):
    """Whole batches of these digits."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        images, labels = zip(*(super(Batches, self).__getitem__(i) for i in range(index, 150, 10)), strict=True)
        return torch.stack(images), torch.stack(labels)


class Endless(Sampler):
    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        return itertools.count()


class Rotates(Sampler):
    """Other indices in each epoch. It holds something that cannot be copied."""

    def __init__(self):
        self.epoch, self.lock = 0, Lock()

    def __len__(self):
        return 100

    def __iter__(self):
        self.epoch += 1
        return ((self.epoch * 30 + i) % 150 for i in range(100))


def every_other():
    return part(0, 150, sampler=SubsetRandomSampler(range(0, 150, 2), torch.Generator().manual_seed(4)))


KINDS = {
    "plain": {},
    "batch normalization": {"model": Normalized},
    "augmentations": {"train": lambda: noisy(0, 150, shuffle=True), "val": lambda: noisy(1000, 1100)},
    "workers": {"train": lambda: noisy(0, 150, shuffle=True, num_workers=1)},
    "own sampler": {"train": every_other},
    "dataset with a state": {"train": lambda: DataLoader(Subset(Counted(), range(150)), batch_size=16, shuffle=True)},
    "dataset of no class of torch": {"train": lambda: DataLoader(OfNoClass(), batch_size=16, shuffle=True)},
    "whole batches with a state": {"train": lambda: DataLoader(Batches(), batch_size=None, shuffle=True)},
    "states of many kinds": {"train": deep},
    "sampler with a state": {"train": lambda: part(0, 150, sampler=Rotates())},
    "validation in mid-epoch": {"val_check_interval": 3},
    "accumulation": {"accumulate_grad_batches": 4, "val_check_interval": 3},
    "no sanity check": {"num_sanity_val_steps": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(kind, tmp_path):
    """Weights, buffers, states of metrics, what is logged, random numbers, modes, and what a checkpoint contains."""
    options = dict(KINDS[kind])
    made = {name: options.pop(name, None) for name in ("model", "train", "val")}
    results = []
    for name, monitors in {"with": [OverfittingMonitor(metric="val/loss")], "without": []}.items():
        memory = Memory()
        model, trainer = run(
            monitors,
            **{key: make() if make else None for key, make in made.items()},
            **options,
            logger=memory,
            log_every_n_steps=1,
        )
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        saved = torch.load(tmp_path / f"{name}.ckpt")
        results.append((model, logged(memory), random_numbers(), traces(model), saved, trainer.callback_metrics))
    (model, *ours, saved, found), (plain, *theirs, expected, monitored) = results
    assert same(model, plain)
    for mine, other in zip(ours, theirs, strict=True):
        assert str(mine) == str(other)
    assert saved["callbacks"].pop("OverfittingMonitor{'name': 'OverfittingMonitor'}", None)
    assert saved.keys() == expected.keys()
    assert saved["callbacks"].keys() == expected["callbacks"].keys()
    assert saved["loops"].keys() == expected["loops"].keys()
    assert {key: float(v) for key, v in found.items() if "reg/" not in key} == {key: float(v) for key, v in monitored.items()}


def test_a_loader_that_is_given_and_trained_with_is_left_as_it_was():
    trained = []
    for is_watched in (True, False):
        train = part(0, 150, sampler=Rotates())
        monitors = [OverfittingMonitor(metric="val/loss", samples={"train": train})] if is_watched else []
        trained.append(run(monitors, train=train)[0])
    assert same(*trained)


class Gradients(Callback):
    """Records gradients around each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.before = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in pl_module.named_parameters()}

    def on_validation_end(self, trainer, pl_module):
        for name, p in pl_module.named_parameters():
            kept, value = self.before[name]
            assert p.grad is kept
            assert value is None or torch.equal(p.grad, value)
            self.seen.append(value is not None)


def test_gradients_in_accumulation_are_kept():
    class Differentiates(Model):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            with torch.enable_grad():
                if (
                    not self.trainer.sanity_checking
                    and self.trainer.fit_loop.epoch_loop.val_loop._results.__class__.__name__ == "Record"
                ):
                    self.net(batch[0]).sum().backward()

    probe = Gradients()
    run(
        [OverfittingMonitor(metric="val/loss"), probe],
        Differentiates(),
        accumulate_grad_batches=4,
        val_check_interval=3,
        inference_mode=False,
    )
    assert any(probe.seen)


def test_loggers_get_nothing_from_the_steps():
    class Draws(Memory):
        def __init__(self):
            super().__init__()
            self.drawn = 0

        @property
        def experiment(self):
            self.drawn += 1
            return self

    class Shows(Model):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.experiment  # noqa: B018  a model would draw a figure with it

    drawn = []
    for monitors in ([OverfittingMonitor(metric="val/loss")], []):
        logger = Draws()
        run(monitors, Shows(), logger=logger)
        drawn.append(logger.drawn)
    assert drawn[0] == drawn[1] > 0


def test_samples_are_fixed_although_a_dataset_is_random():
    class Still(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", batch[0].sum())

    monitor = OverfittingMonitor()
    run([monitor], Still(), DataLoader(Noisy(0, 150), batch_size=16, shuffle=True), DataLoader(Noisy(1000, 1100)))
    assert len({(point.train, point.val) for point in monitor.points}) == 1


def test_hooks_of_the_data_module_and_collate_functions_are_used():
    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return {"images": torch.stack(images), "labels": torch.stack(labels)}

    class Data(LightningDataModule):
        def train_dataloader(self):
            return part(0, 150, collate_fn=collate)

        def val_dataloader(self):
            return part(1000, 1100, collate_fn=collate)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch["images"] if self.trainer.validating else batch["images"], batch["labels"]

    monitor = OverfittingMonitor(metric="val/loss")
    seed(0)
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[monitor])
    trainer.fit(Model(), datamodule=Data())
    assert monitor.points[-1].val == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-5)


# Which samples -------------------------------------------------------------------------------------------------------


class Seen(Dataset):
    """The indices of the samples that it was asked for."""

    asked = []

    def __init__(self, size):
        self.size = size
        self.asked.clear()  # of the class, since attributes of the instance are restored

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.asked.append(index)
        images, labels = digits(self.size)
        return images[index], labels[index]


def test_samples_are_drawn_from_what_is_trained():
    for options, trainer, allowed in [
        ({"shuffle": True}, {}, range(200)),
        ({"sampler": SubsetRandomSampler(range(50, 90))}, {}, range(50, 90)),
        ({"sampler": [3, 5, 8] * 20}, {}, {3, 5, 8}),
        ({"batch_sampler": [[1, 2], [3, 4]] * 5}, {}, {1, 2, 3, 4}),
        ({"batch_size": 10}, {"limit_train_batches": 4}, range(40)),
    ]:
        data = Seen(200)
        monitor = OverfittingMonitor(metric="val/loss")
        run([monitor], train=DataLoader(data, **options), max_epochs=1, **trainer)
        assert set(data.asked) == set(allowed), options


class Stream(IterableDataset):
    def __iter__(self):
        images, labels = digits(200)
        yield from zip(images, labels, strict=True)


def test_loaders_can_be_given():
    stream = DataLoader(Stream(), batch_size=16)
    model, _ = run([], train=stream)
    for samples in (part(0, 200, 10), {"train": part(0, 200, 10)}, {"train": part(0, 200, 10), "val": part(1000, 1300, 10)}):
        monitor = OverfittingMonitor(metric="val/loss", samples=samples)
        monitored, _ = run([monitor], train=stream)
        assert same(monitored, model)
        assert monitor.points[-1].train == pytest.approx(all_samples(model, 0, 200), rel=1e-5)
        assert monitor.points[-1].val == pytest.approx(all_samples(model, 1000, 1300), rel=1e-5)


def test_only_the_first_batches_of_a_given_loader_are_used():
    class Endless(IterableDataset):
        def __iter__(self):
            images, labels = digits(1)
            while True:
                yield images[0], labels[0]

    counting = Counting()
    monitor = OverfittingMonitor(metric="val/loss", samples=DataLoader(Endless(), batch_size=128))
    run([monitor], counting, max_epochs=1, num_sanity_val_steps=0)
    assert [size for size, *_ in counting.record.entries].count(128) == 1 + 20
    assert monitor.points


def test_several_validation_loaders():
    class Several(Model):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    loaders = [part(1000, 1100), part(1100, 1200)]
    with pytest.raises(
        ValueError, match=r"cannot draw a sample of the validation data: there are 2 loaders\. Pass one, as in "
    ):
        run([OverfittingMonitor(metric="val/loss")], Several(), val=loaders)
    samples = {"train": part(0, 100), "val": loaders[1]}
    monitor = OverfittingMonitor(metric="val/loss", samples=samples)
    _, trainer = run([monitor], Several(), val=loaders)
    assert monitor.points[-1].val == pytest.approx(float(trainer.callback_metrics["val/loss/dataloader_idx_1"]), rel=1e-5)


def test_a_single_loader_in_a_dictionary():
    monitor = OverfittingMonitor(metric="val/loss")
    _, trainer = run([monitor], val={"digits": part(1000, 1300)})
    assert monitor.points[-1].val == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-5)


def test_datasets_of_whole_batches():
    def batches(first, last):
        images, labels = digits(last)
        return DataLoader(list(zip(images[first:].split(10), labels[first:].split(10), strict=True)), batch_size=None)

    monitor = OverfittingMonitor(metric="val/loss", samples=10_000)
    model, _ = run([monitor], train=batches(0, 250), val=batches(1000, 1300))
    assert monitor.points[-1].train == pytest.approx(all_samples(model, 0, 250), rel=1e-5)
    assert monitor.points[-1].gap_margin > 0


# Other callbacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", [False, True], ids=["no logger", "logger"])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_other_callbacks_find_the_values(first, logger, tmp_path):
    """Those of this epoch, wherever they are in the list, also between two callbacks of this package."""

    class Asks(Callback):
        seen = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.seen.append(float(trainer.callback_metrics["reg/OverfittingMonitor/gap"]))

    stop = EarlyStopping(monitor="reg/OverfittingMonitor/gap", patience=0, mode="max", min_delta=100)
    save = ModelCheckpoint(tmp_path, monitor="reg/OverfittingMonitor/val", filename="{epoch}")
    asks, monitor = Asks(), OverfittingMonitor(metric="val/loss", every_n_epochs=2)
    callbacks = [L2Penalty(0.1), asks, monitor] if first else [asks, stop, save, monitor]
    _, trainer = run(
        [*callbacks, stop, save] if first else callbacks,
        logger=Memory() if logger else False,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    assert trainer.current_epoch == 2  # stopped after the second epoch
    assert asks.seen == [point.gap for point in monitor.points] or asks.seen == pytest.approx([p.gap for p in monitor.points])
    assert save.best_model_path.endswith("epoch=1.ckpt")
    asks.seen.clear()


def test_metrics_are_logged_like_lightnings():
    memory = Memory()
    run([OverfittingMonitor(metric="val/loss")], logger=memory)
    rows = {step: metrics for step, metrics in memory.steps.items() if "reg/OverfittingMonitor/gap" in metrics}
    assert list(rows) == [step for step, metrics in memory.steps.items() if "val/loss" in metrics]
    assert [row["epoch"] for row in rows.values()] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_fit_goes_on_with_its_curves(tmp_path):
    whole, rest = (OverfittingMonitor(metric="val/loss") for _ in range(2))
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train = part(0, 150)
    run([whole, saves], train=train, enable_checkpointing=True, default_root_dir=tmp_path)
    seed(0)
    Trainer(**QUIET, max_epochs=3, callbacks=[rest]).fit(Model(), train, part(1000, 1300), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert rest.points == whole.points
    assert str(rest.verdict) == str(whole.verdict)


def test_new_fit_starts_new_curves():
    monitor = OverfittingMonitor(metric="val/loss")
    run([monitor])
    before = copy.copy(monitor.points)
    run([monitor])
    assert monitor.points == before


def test_one_line_at_the_end(capsys):
    monitor = OverfittingMonitor(metric="val/loss")
    run([monitor])
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"OverfittingMonitor: {monitor.verdict}" in printed


# Mistakes ------------------------------------------------------------------------------------------------------------


class Keeps(Model):
    def __init__(self):
        super().__init__()
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(batch_idx)


class Counts(Model):
    seen = 0

    def __init__(self):
        super().__init__()
        self.seen = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen += len(batch[1])


def collecting(held, collect):
    """Return a class of models that collect something in ``self.held``, a copy of what is given."""

    class Collects(Model):
        def __init__(self):
            super().__init__()
            self.held = copy.deepcopy(held)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            collect(self.held)

    return Collects


class Meter:
    """An average meter, as many projects write their own."""

    def __init__(self):
        self.total, self.all = np.float32(0), []

    def add(self, value):
        self.total += np.float32(value)


COLLECTING = {
    "dictionary of lists": ({"outputs": []}, lambda held: held["outputs"].append(1)),
    "dictionary of numbers": ({"seen": 0}, lambda held: held.update(seen=held["seen"] + 1)),
    "list of lists": ([[], []], lambda held: held[1].append(1)),
    "list in a tuple": (([],), lambda held: held[0].append(1)),
    "array": (np.zeros(3), lambda held: np.add(held, 1, out=held)),
    "dictionary of tensors": ({"counts": torch.zeros(3)}, lambda held: held["counts"].add_(1)),
    "meter": (Meter(), lambda held: held.add(1)),
    "list in a meter": (Meter(), lambda held: held.all.append(1)),
    "meters": ({"loss": Meter()}, lambda held: held["loss"].add(1)),
}


@pytest.mark.parametrize("name", COLLECTING)
def test_what_is_collected_inside_an_attribute(name):
    with pytest.raises(ValueError, match=r"Collects\.validation_step collects something in self\.held, where"):
        run([OverfittingMonitor(metric="val/loss")], collecting(*COLLECTING[name])())


def test_what_only_changes_inside_an_attribute_is_restored():
    """Here, what the last batch left behind."""
    held = {"last": [None], "meter": Meter(), "array": np.zeros(3)}

    def replace(held):
        held["last"][0] = torch.rand(2).tolist()
        held["meter"].all = held["last"][0]

    left = []
    for monitors in ([OverfittingMonitor(metric="val/loss")], []):
        model, _ = run(monitors, collecting(held, replace)())
        left.append((model.held["last"], model.held["meter"].all))
    assert left[0] == left[1]


class LogsLater(Classifier):
    def __init__(self):
        super().__init__()
        self.loss = torchmetrics.MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.loss.update(cross_entropy(self.net(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("val/loss", self.loss.compute())
        self.loss.reset()


class TwoLosses(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)
        self.log("val/other_loss", 1.0)


class NoLoss(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", 1.0)
        self.log("val/f1", 1.0)


class Fetches(Classifier):
    def validation_step(self, dataloader_iter):
        next(dataloader_iter)


class Unsized(Dataset):
    def __getitem__(self, index):
        return digits(200)[0][index], digits(200)[1][index]


def mistake(**options):
    """Return a function that trains with a monitor."""
    made = {name: options.pop(name) for name in ("model", "train", "val") if name in options}
    trainer = {name: options.pop(name) for name in ("limit_val_batches",) if name in options}
    return lambda: run([OverfittingMonitor(**options)], **{name: make() for name, make in made.items()}, **trainer)


PAIR = re.escape("samples={'train': <DataLoader>, 'val': <DataLoader>}")
MISTAKES = {
    "no step": (
        mistake(model=Classifier, val=tuple),
        "OverfittingMonitor evaluates with validation_step, but Classifier has none: define one that logs",
    ),
    "no data": (
        lambda: fit([OverfittingMonitor()], Model()),
        r"OverfittingMonitor needs validation data, but there is no val_dataloader: pass some, as in trainer\.fit",
    ),
    "limit 0": (mistake(limit_val_batches=0), "needs validation data, but limit_val_batches is 0: remove it"),
    "barebones": (
        lambda: Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[OverfittingMonitor()]).fit(
            Model(), loader(), loader()
        ),
        r"OverfittingMonitor needs a fit that validates, but Trainer\(barebones=True\) does not: remove it",
    ),
    "misspelt metric": (
        mistake(metric="val/acuracy"),
        r"OverfittingMonitor: Model\.validation_step does not log 'val/acuracy'\. Close names: val/accuracy",
    ),
    "strange metric": (
        mistake(metric="xyz"),
        r"does not log 'xyz'\. Close names: val/loss, val/plain, .*\. What on_validation_epoch_end logs cannot",
    ),
    "logged at the end": (
        mistake(model=LogsLater),
        r"LogsLater\.validation_step logs nothing: log the metric in it.*self\.log\('val/accuracy', self\.accuracy\)",
    ),
    "several losses": (
        mistake(model=TwoLosses),
        r"TwoLosses\.validation_step logs val/loss, val/other_loss: choose one, as in metric='val/loss'",
    ),
    "no loss": (
        mistake(model=NoLoss),
        "logs no name with 'loss', but val/accuracy, val/f1: choose one, as in metric='val/accuracy'",
    ),
    "kept outputs": (
        mistake(model=Keeps),
        r"OverfittingMonitor: Keeps\.validation_step collects something in self\.outputs, .*torchmetrics\.CatMetric\(\)",
    ),
    "kept number": (mistake(model=Counts), r"Counts\.validation_step collects something in self\.seen"),
    "iterator": (
        mistake(model=Fetches),
        r"Fetches\.validation_step\(dataloader_iter\) fetches its batches itself.*write validation_step\(batch, batch_idx\)",
    ),
    "stream": (
        mistake(train=lambda: DataLoader(Stream(), batch_size=16)),
        "OverfittingMonitor cannot draw a sample of the training data: Stream is an IterableDataset, which does not give "
        r"single samples by index\. Pass one, as in samples=<DataLoader>",
    ),
    "validation stream": (
        mistake(val=lambda: DataLoader(Stream(), batch_size=16)),
        f"of the validation data: Stream is an IterableDataset.*{PAIR}",
    ),
    "no length": (
        mistake(train=lambda: DataLoader(Unsized(), sampler=iter(range(50)))),
        r"the dataset Unsized has no length\. Pass one, as in samples=<DataLoader>",
    ),
    "sampler to read once": (
        mistake(train=lambda: part(0, 50, sampler=(index for index in range(50)))),
        r"its sampler is an iterator, which can be read only once\. Pass one, as in samples=<DataLoader>",
    ),
    "sampler without a length": (mistake(train=lambda: DataLoader(Unsized(), sampler=Endless())), "Unsized has no length"),
    "no loader": (
        mistake(train=lambda: NotALoader()),
        r"the loader is not a torch\.utils\.data\.DataLoader but a NotALoader\. Pass one",
    ),
    "mode": (mistake(mode="smallest"), "OverfittingMonitor: mode must be 'min' or 'max', got 'smallest'"),
    "no samples": (mistake(samples=0), "OverfittingMonitor: samples must be an integer ≥ 1, got 0"),
    "truth": (mistake(samples=True), "OverfittingMonitor: samples must be an integer ≥ 1, got True"),
    "keys": (mistake(samples={"training": 1}), "samples must have the keys 'train' and 'val', got 'training'"),
    "never": (mistake(every_n_epochs=0), "OverfittingMonitor: every_n_epochs must be an integer ≥ 1, got 0"),
}


class NotALoader:
    def __iter__(self):
        return iter(loader())

    def __len__(self):
        return len(loader())


@pytest.mark.filterwarnings(
    "ignore:.*validation_step",
    "ignore:You passed in a `val_dataloader`",
    "ignore:You are using the `dataloader_iter`",
    "ignore:Your `IterableDataset`",
)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    act, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize(
    ("samples", "message"), [("all", "got 'all'"), ({"train": [1]}, r"got \[1\]"), (2.5, "got 2.5")], ids=str
)
def test_wrong_types(samples, message):
    expected = "samples must be an integer, a DataLoader, or {'train': <DataLoader>, 'val': <DataLoader>}, "
    with pytest.raises(TypeError, match=re.escape(expected) + message):
        OverfittingMonitor(samples=samples)
    with pytest.raises(TypeError, match="metric must be the name of a logged metric, got the class MeanMetric"):
        OverfittingMonitor(metric=torchmetrics.MeanMetric)


def test_training_batches_of_another_form():
    class Other(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    images, labels = digits(150)
    train = DataLoader(TensorDataset(images, labels, labels), batch_size=16)
    expected = (
        r"OverfittingMonitor: Other\.validation_step failed on a batch of the training data \(ValueError: too many values.*"
        r"training batches must look like validation batches.*samples=\{'train': <DataLoader>"
    )
    with pytest.raises(RuntimeError, match=expected) as raised:
        run([OverfittingMonitor(metric="val/loss")], Other(), train)
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_failure_on_validation_data_is_not_blamed_on_training_batches():
    class Fails(Model):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking and len(batch[0]) < 16:  # the monitor's batches are small
                raise MemoryError("no memory")

    images, labels = digits(150)
    samples = DataLoader(TensorDataset(images, labels), batch_size=16, drop_last=True)
    with pytest.raises(RuntimeError, match=r"failed on a batch of the validation data \(MemoryError: no memory\)$"):
        run([OverfittingMonitor(metric="val/loss", samples={"train": samples, "val": DataLoader(samples.dataset, 8)})], Fails())


def test_mistakes_show_before_the_training():
    class Trains(Keeps):
        def training_step(self, batch, batch_idx):
            raise AssertionError("too late")

    with pytest.raises(ValueError, match="collects something"):
        run([OverfittingMonitor(metric="val/loss")], Trains())


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
def test_subsets_and_empty_data():
    images, labels = digits(10)
    empty = Subset(TensorDataset(images, labels), [])
    with pytest.raises(ValueError, match="of the validation data: it has no samples"):
        run([OverfittingMonitor(metric="val/loss")], val=DataLoader(empty))
