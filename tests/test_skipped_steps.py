"""A step that the guard skips leaves no trace in the model, and a message that says so."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import QUIET, Classifier, Memory, digits, fit, identical, same
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_reg import NonFiniteGradientGuard, WeightDecay
from lightning_reg._tensors.buffers import GoodBuffers

SKIPS = "infinite or NaN gradients at step"


def batches(*factors):
    """Return one batch of digits per factor, by which its images are multiplied."""
    images, labels = digits(16 * len(factors))
    parts = zip(images.split(16), labels.split(16), factors, strict=True)
    return DataLoader([(x * factor, y) for x, y, factor in parts], batch_size=None)


class Network(Classifier):
    """A convolutional network with batch normalization, and buffers of other kinds."""

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__(momentum=momentum)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
            )
        self.register_buffer("largest", torch.full((2,), -math.inf))  # infinite on purpose, until it has seen a batch
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.before = []

    def training_step(self, batch, batch_idx):
        self.before.append({name: buffer.clone() for name, buffer in self.named_buffers()})
        self.largest[0] = torch.maximum(self.largest[0], batch[0].amax())
        self.count += 1
        return super().training_step(batch, batch_idx)


def statistics(model):
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_buffers_get_back_the_values_from_before_the_bad_batch(policy):
    with pytest.warns(UserWarning, match=SKIPS):
        model = fit([NonFiniteGradientGuard(policy)], Network(), batches(1.0, 1.0, math.nan), max_epochs=1)
    before = {name: model.before[2][name] for name in statistics(model)}
    assert identical(statistics(model), before)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not identical(before, {name: model.before[1][name] for name in before})
    unguarded = fit([], Network(), batches(1.0, 1.0, math.nan), max_epochs=1)
    assert unguarded.net[2].running_mean.isnan().all()


def test_a_skipped_step_equals_a_run_without_the_batch():
    with pytest.warns(UserWarning, match=SKIPS):
        skipped = fit([NonFiniteGradientGuard(), WeightDecay(0.1)], Network(), batches(1.0, math.nan, 1.0), max_epochs=1)
    images, labels = digits(48)
    without = DataLoader([(images[:16], labels[:16]), (images[32:], labels[32:])], batch_size=None)
    expected = fit([NonFiniteGradientGuard(), WeightDecay(0.1)], Network(), without, max_epochs=1)
    expected.count += 1  # integer buffers count the batch
    expected.net[2].num_batches_tracked += 1
    assert same(skipped, expected)


@pytest.mark.parametrize("bad", range(4))
def test_with_accumulation_good_batches_of_a_bad_step_count_until_the_bad_one(bad):
    """Batch normalization has seen the good batches before the bad one, and those after it start from these statistics."""
    factors = [math.nan if i == bad else 1.0 for i in range(4)]
    with pytest.warns(UserWarning, match=SKIPS):
        model = fit([NonFiniteGradientGuard()], Network(), batches(*factors), max_epochs=1, accumulate_grad_batches=4)
    before = {name: model.before[bad][name] for name in statistics(model) if "running" in name}
    assert identical({name: statistics(model)[name] for name in before}, before)


class TwoLosses(Network):
    """Manual optimization with two optimizers. The second loss is bad, in a forward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[1].parameters(), lr=0.1), torch.optim.SGD(self.net[5].parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        for optimizer, factor in zip(self.optimizers(), (1.0, math.nan), strict=True):
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.net(batch[0] * factor), batch[1]))
            optimizer.step()


class StepsEveryFourBatches(Network):
    """Manual optimization that accumulates by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_in_manual_optimization_a_second_bad_step_of_a_batch_leaves_finite_buffers():
    with pytest.warns(UserWarning, match=SKIPS):
        model = fit([NonFiniteGradientGuard()], TwoLosses(), batches(1.0, 1.0), max_epochs=1)
    assert statistics(model)["net.2.running_mean"].isfinite().all()


@pytest.mark.parametrize("bad", range(4))
def test_accumulation_by_hand(bad):
    factors = [math.nan if i == bad else 1.0 for i in range(4)]
    with pytest.warns(UserWarning, match=SKIPS):
        model = fit([NonFiniteGradientGuard()], StepsEveryFourBatches(), batches(*factors), max_epochs=1)
    assert identical({"mean": model.net[2].running_mean}, {"mean": model.before[bad]["net.2.running_mean"]})


def test_a_validated_model_is_as_accurate_as_before():
    """With the bad batch, the unguarded model would predict one class for all images."""

    class Validated(Network):
        def validation_step(self, batch, batch_idx):
            self.accuracy = float((self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def accuracy(callbacks, factors):
        model = Validated()
        validation = DataLoader([digits(512)], batch_size=None)
        options = {**QUIET, "max_epochs": 8, "num_sanity_val_steps": 0}
        Trainer(**options, callbacks=callbacks).fit(model, batches(*factors), validation)
        return model.accuracy

    good = accuracy([NonFiniteGradientGuard()], [1.0] * 16)
    with pytest.warns(UserWarning, match=SKIPS):
        guarded = accuracy([NonFiniteGradientGuard()], [1.0] * 15 + [math.nan])
    assert good > 0.9
    assert guarded > good - 0.05
    assert accuracy([], [1.0] * 15 + [math.nan]) < 0.2


def test_a_resumed_run_restores_buffers(tmp_path):
    def run(ckpt=None):
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model, guard = Network(), NonFiniteGradientGuard()
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": 1, "callbacks": [guard, checkpoint]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(infinite or NaN|num_workers|exists and is not empty)")
            Trainer(**options).fit(model, Counted(batches(1.0, math.nan, 1.0, math.nan, 1.0)), ckpt_path=ckpt)
        return model, guard

    whole, guard = run()
    resumed, resumed_guard = run(tmp_path / "step=2.ckpt")
    assert same(whole, resumed)
    assert guard.fit_summary() == resumed_guard.fit_summary() == "2 steps skipped because of infinite or NaN gradients"


class Counted:
    """A loader that resumes in the middle of an epoch."""

    def __init__(self, data):
        self.data, self.position, self.skip = list(data), 0, 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        self.position, self.skip = self.skip, 0
        while self.position < len(self.data):
            self.position += 1
            yield self.data[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.skip = state["position"] % len(self.data)


# What the user sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", [False, True], ids=["no logger", "logger"])
@pytest.mark.parametrize(
    ("policy", "warned", "line"),
    [
        ("skip", "skipping the step", "NonFiniteGradientGuard: 2 steps skipped because of infinite or NaN gradients"),
        (
            "zero",
            "setting these entries to 0",
            "NonFiniteGradientGuard: 2 steps with entries set to 0 because of infinite or NaN",
        ),
    ],
)
def test_the_first_bad_step_warns_and_a_line_counts_all(policy, warned, line, logger, capsys):
    data, loggers = batches(1.0, math.nan, 1.0, math.nan), Memory() if logger else False
    with pytest.warns(UserWarning, match=f"{SKIPS} 1 in .*: {warned}") as caught:
        fit([NonFiniteGradientGuard(policy)], Network(), data, max_epochs=1, logger=loggers, log_every_n_steps=1)
    assert sum(SKIPS in str(warning.message) for warning in caught) == 1
    assert line in " ".join(capsys.readouterr().out.split())


def test_without_a_bad_step_nothing_is_said(capsys):
    fit([NonFiniteGradientGuard()], Network(), batches(1.0, 1.0), max_epochs=1)
    assert "NonFiniteGradientGuard" not in capsys.readouterr().out


# The buffers --------------------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def test_a_buffer_that_is_replaced_or_changes_its_shape_is_followed():
    module = Buffered(history=torch.zeros(1), extra=None)
    buffers = GoodBuffers(module)
    buffers.record(trusted=True)
    module.history = torch.ones(3)
    buffers.record(trusted=True)
    module.history = torch.tensor([1.0, math.nan, 1.0])
    buffers.restore()
    assert module.history.tolist() == [1.0, 1.0, 1.0]


def test_only_buffers_that_became_non_finite_are_restored():
    module = Buffered(good=torch.zeros(2), bad=torch.zeros(2), infinite=torch.tensor([math.inf, 0.0]))
    buffers = GoodBuffers(module)
    buffers.record(trusted=True)
    module.good += 1
    module.bad += torch.tensor([1.0, math.nan])
    module.infinite[1] = 5.0
    buffers.restore()
    assert (module.good.tolist(), module.bad.tolist(), module.infinite.tolist()) == ([1, 1], [0, 0], [math.inf, 5])


def test_a_buffer_that_no_batch_changes_is_copied_once(monkeypatch):
    module = Buffered(table=torch.zeros(1000))
    buffers = GoodBuffers(module)
    buffers.record(trusted=True)
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args: copies.append(args))
    for _ in range(3):
        buffers.record(trusted=True)
    assert copies == []


def test_bad_values_do_not_become_good_ones_before_the_step():
    module = Buffered(mean=torch.zeros(1))
    buffers = GoodBuffers(module)
    buffers.record(trusted=True)
    module.mean.fill_(math.nan)
    buffers.record(trusted=False)  # the next batch of the same step
    module.mean.fill_(math.nan)
    buffers.restore()
    assert module.mean.tolist() == [0.0]


class Half(LightningModule):
    """Trains in bfloat16, buffers too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).to(torch.bfloat16)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0].to(torch.bfloat16)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_half_precision_buffers():
    with pytest.warns(UserWarning, match=SKIPS):
        model = fit([NonFiniteGradientGuard()], Half(), batches(1.0, math.nan), max_epochs=1)
    assert model.net[1].running_var.dtype == torch.bfloat16
    assert model.net[1].running_var.isfinite().all()
