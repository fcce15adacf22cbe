"""Shared behavior of callbacks: metrics, the summary, names, schedules, and unsupported runs."""

from __future__ import annotations

import copy
import math
import pickle
import types

import pytest
import torch
from helpers import Classifier, Gan, Memory, Unfreezes, digits, fit, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from table import ROWS, everything
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg import (
    DropoutInjection,
    DropoutScheduler,
    GradientNormClipping,
    GradientValueClipping,
    L1Penalty,
    L2Penalty,
    Linear,
    PeakGradientDropping,
    Penalty,
    RandomShrinkage,
    Steps,
    WeightClipping,
)
from lightning_reg._engine import _lightning
from lightning_reg._engine.plan import Step


def logged(callbacks, model=None, **kwargs):
    logger = Memory()
    fit(callbacks, model, logger=logger, **{"log_every_n_steps": 1, **kwargs})
    return {step: {k: v for k, v in metrics.items() if k.startswith("reg/")} for step, metrics in logger.steps.items()}


class Recorder(Classifier):
    """Recomputes the logged values by hand."""

    def on_train_start(self):
        self.l1, self.norm = [], []

    def on_before_backward(self, loss):
        self.l1.append(sum(self.net[i].weight.detach().abs().sum().item() for i in (0, 4)))

    def on_after_backward(self):
        self.norm.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters())))


def test_penalties_log_value_and_strength_on_both_routes():
    for route in ("loss", "gradient"):
        model = Recorder()
        steps = logged([L1Penalty(Linear(0.0, 0.08), inject=route)], model, max_epochs=2)
        strengths = [0.01 * i for i in range(8)]
        assert [m["reg/L1Penalty/strength"] for m in steps.values()] == pytest.approx(strengths)
        values = [m.get("reg/L1Penalty/penalty", 0.0) for m in steps.values()]
        assert values == pytest.approx([s * l1 for s, l1 in zip(strengths, model.l1, strict=True)], rel=1e-5)


def test_norm_clipping_logs_norms_and_clipped_steps():
    model = Recorder()
    steps = logged([GradientNormClipping(1.0)], model, max_epochs=2)
    before = [m["reg/GradientNormClipping/norm_before"] for m in steps.values()]
    assert before == pytest.approx(model.norm, rel=1e-5)
    assert [m["reg/GradientNormClipping/norm_after"] for m in steps.values()] == pytest.approx(
        [min(n, 1) for n in before], rel=1e-5
    )
    assert [m["reg/GradientNormClipping/clipped_steps"] for m in steps.values()] == [float(n > 1) for n in before]
    assert {n > 1 for n in before} == {True, False}


def test_clipped_fraction_covers_steps_since_last_log():
    model = Recorder()
    (steps,) = [logged([GradientNormClipping(1.0)], model, max_epochs=2, log_every_n_steps=4, limit_train_batches=4)]
    clipped = torch.tensor(model.norm).gt(1).float().view(2, 4).mean(1).tolist()
    assert [m["reg/GradientNormClipping/clipped_steps"] for m in steps.values()] == pytest.approx(clipped)
    assert list(steps) == [3, 7]


def test_other_metrics():
    callbacks = [
        PeakGradientDropping(),
        GradientValueClipping(0.01),
        WeightClipping(0.05),
        DropoutInjection(0.3, after="ReLU"),
        RandomShrinkage(0.1),
        L2Penalty(0.1),
    ]
    (first, *_) = logged(callbacks, max_epochs=1).values()
    assert set(first) == {
        "reg/PeakGradientDropping/norm_before",
        "reg/PeakGradientDropping/norm_after",
        "reg/GradientValueClipping/clip_value",
        "reg/GradientValueClipping/clipped_entries",
        "reg/GradientValueClipping/clipped_steps",
        "reg/GradientValueClipping/nonfinite_steps",
        "reg/GradientValueClipping/norm_before",
        "reg/GradientValueClipping/norm_after",
        "reg/WeightClipping/clip_value",
        "reg/WeightClipping/constrained",
        "reg/DropoutInjection-ReLU/p",
        "reg/DropoutInjection-ReLU/progress",
        "reg/RandomShrinkage/epsilon",
        "reg/L2Penalty/strength",
        "reg/L2Penalty/penalty",
    }
    assert first["reg/PeakGradientDropping/norm_before"] > first["reg/PeakGradientDropping/norm_after"]
    assert first["reg/PeakGradientDropping/norm_after"] == first["reg/GradientValueClipping/norm_before"]
    assert 0 < first["reg/GradientValueClipping/clipped_entries"] < 1
    assert 0 < first["reg/WeightClipping/constrained"] < 1


def test_metrics_follow_logging_interval_and_can_be_monitored():
    assert list(logged([L1Penalty(0.1)], max_epochs=2, log_every_n_steps=3)) == [2, 5]
    assert list(logged([L1Penalty(0.1)], max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=2)) == [0, 1, 2, 3]
    fit(
        [L1Penalty(0.1), EarlyStopping("reg/L1Penalty/penalty", check_on_train_epoch_end=True)],
        logger=Memory(),
        log_every_n_steps=1,
    )


def test_no_metrics_without_logger():
    class NeverLogs(GradientNormClipping):
        def log(self, **metrics):
            raise AssertionError("logged without a logger")

        average = log

    fit([NeverLogs(0.1)])


def summary(capsys, callbacks, model=None):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, callbacks=callbacks)
    trainer.fit(model or Classifier(), loader())
    return capsys.readouterr().out


def test_summary_lists_callbacks_and_targets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = summary(
        capsys, [WeightClipping(0.5), L1Penalty(Linear(0.0, 0.1, until="1st")), GradientNormClipping(1.0, params="net.0.*")]
    )
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in table.splitlines()
        if "│" in line and ("Penalty" in line or "Clip" in line)
    ]
    assert rows == [
        [
            "L1Penalty",
            "2 tensors, 1,184 parameters: net.0.weight, net.4.weight",
            "strength=Linear(0.0, 0.1, until='1st')",
            "loss",
        ],
        [
            "GradientNormClipping-net_0",
            "2 tensors, 1,040 parameters: net.0.weight, net.0.bias",
            "max_norm=1.0, params='net.0.*'",
            "before the step",
        ],
        ["WeightClipping", "2 tensors, 1,184 parameters: net.0.weight, net.4.weight", "clip_value=0.5", "after the step"],
    ]
    assert table.count("Regularization") == 1


def test_summary_can_be_disabled(capsys):
    fit(everything(), enable_model_summary=False, max_epochs=1)
    assert "Regularization" not in capsys.readouterr().out


def test_default_names_include_selection():
    assert L1Penalty(0.1).name == "L1Penalty"
    assert L1Penalty(0.1, params=["encoder.*", "!*.bias"]).name == "L1Penalty-encoder-bias"
    assert L1Penalty(0.1, params="all").name == "L1Penalty-all"
    assert L1Penalty(0.1, name="sparsity").name == "sparsity"
    assert L1Penalty(0.1, name="sparsity").state_key == "L1Penalty{'name': 'sparsity'}"


def test_unfrozen_parameters_are_regularized():
    class Counts(Classifier):
        def on_train_start(self):
            self.counts = []

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.counts.append((self.net[0].weight.abs().max() <= 0.05).item())

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    model = fit([WeightClipping(0.05), Unfreezes()], Counts())
    assert model.counts == [False] * 4 + [True] * 4


def test_schedules_follow_varying_accumulation():
    """Two epochs of 4 batches: 4 steps, then 2 steps of two batches."""
    for schedule, expected in (
        (Steps([0.0, 0.1], at=["5st"]), [0.0] * 5 + [0.1]),
        (Linear(0.0, 0.8), [0.0, 0.1, 0.2, 0.3, 0.4, 0.6]),
    ):
        for limit in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 6}):
            seen = strengths(schedule, GradientAccumulationScheduler({0: 1, 1: 2}), **limit)
            assert seen == pytest.approx(expected)


def strengths(schedule, *callbacks, model=None, data=None, **kwargs):
    """Return the strength in each optimizer step of a run."""
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([RecordedPenalty(schedule, inject="gradient"), *callbacks], model, data, **kwargs)
    return seen


class Endless(IterableDataset):
    """A dataset of digits without a length."""

    def __iter__(self):
        return iter(zip(*digits(64), strict=True))


def test_data_of_unknown_length():
    data = DataLoader(Endless(), batch_size=16)
    assert strengths(Steps([0.0, 0.1], at=["2st"]), data=data, max_epochs=1) == [0.0, 0.0, 0.1, 0.1]
    assert strengths(lambda x: x, data=data, max_steps=4) == [0.0, 0.25, 0.5, 0.75]
    for schedule in (lambda x: x, Linear(0.0, 1.0), Linear(0.0, 1.0, until="2ep")):
        assert strengths(schedule, data=data, max_epochs=2) == [0.0] * 4 + [0.5] * 4  # once per epoch


class Normalized(Classifier):
    """A model with batch normalization, for which weight averaging adds an epoch that only updates statistics."""

    def __init__(self):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16)


def test_epoch_without_training_does_not_count():
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    seen = strengths(Linear(0.0, 1.2), averaging, model=Normalized(), max_epochs=3)
    assert seen == pytest.approx([i / 10 for i in range(12)])
    ends = []

    class Counts(RandomShrinkage):
        def epoch_end(self, params, step):
            ends.append(step)

    fit([Counts(0.1, every="epoch"), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)], Normalized(), max_epochs=3)
    assert ends == [Step(4), Step(8), Step(12)]


def test_unwrapped_optimizer_step_warns():
    class Unwrapped(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="L2Penalty did not act in a step of SGD that Lightning did not take"):
        fit([L2Penalty(0.1)], Unwrapped())


def test_logged_penalty_covers_all_optimizers():
    (first, *_) = logged([L1Penalty(1.0)], Gan(lr=0.0), max_epochs=1).values()
    assert first["reg/L1Penalty/penalty"] == pytest.approx(sum(Gan(lr=0.0).net[i].weight.abs().sum().item() for i in (0, 4)))


def test_model_copied_during_fit_is_plain():
    class Copies(Classifier):
        def on_train_end(self):
            self.copied = [copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))]

    model = fit([DropoutInjection(0.9, after="ReLU"), DropoutScheduler(0.0)], Copies())
    x = digits(8)[0]
    for copied in model.copied:
        copied[3].p = 0.0
        assert_close(copied.train()(x), copied.eval()(x))


def test_values_can_change_between_fits():
    callback = WeightClipping(0.01)
    fit([callback])
    callback.clip_value = 0.05
    assert fit([callback]).net[4].weight.abs().max() == torch.tensor(0.05)


def test_subclass_with_keyword_arguments():
    class Mine(L1Penalty):
        def __init__(self, strength, **kwargs):
            super().__init__(strength, **kwargs)

    assert repr(Mine(0.1)) == "Mine(0.1)"
    assert Mine(0.1, params="net.0.*").name == "Mine-net_0"


@pytest.mark.parametrize("params", [None, 3, [Classifier().net[0].weight]])
def test_selection_of_wrong_type_raises(params):
    with pytest.raises(TypeError, match="L1Penalty: params must name parameters, got "):
        L1Penalty(0.1, params=params)


def test_complex_parameters_raise():
    model = Classifier()
    model.phase = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="WeightClipping needs real parameters, got complex phase: exclude them"):
        fit([WeightClipping(0.1)], model)


def test_abstract_class_raises():
    with pytest.raises(TypeError, match="abstract"):
        Penalty(0.1)


def test_plan_of_run():
    class Planned(Classifier):
        def on_train_start(self):
            plan = _lightning.plan_of(self.trainer, in_batch=False)
            self.plan = (plan.total, plan.per_epoch, plan.per_step[0])

    assert fit(model=Planned(), max_epochs=3).plan == (12, 4, 1)
    assert fit(model=Planned(), max_epochs=3, accumulate_grad_batches=3).plan == (12, 4, 3)
    assert fit(model=Planned(), max_epochs=3, accumulate_grad_batches=3, max_steps=3).plan == (7, 4, 3)
    assert fit(model=Planned(), max_epochs=-1, max_steps=3).plan == (3, 4, 1)
    assert fit(model=Planned(), max_epochs=3, limit_train_batches=2).plan == (6, 2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GradientNormClipping", r"GradientNormClipping does not work with DeepSpeed: set Trainer\(gradient_clip_val=…\)"),
        ("GradientValueClipping", r"does not work with DeepSpeed: its engine clips by norm only"),
        ("L1Penalty", "does not work with DeepSpeed: add the penalty to the loss in training_step"),
        ("WeightClipping", "does not work with DeepSpeed: use DDP or FSDP2"),
    ],
)
def test_deepspeed_raises_with_alternative(name, message):
    trainer = types.SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), callbacks=[])  # DeepSpeed cannot run on a CPU
    with pytest.raises(ValueError, match=message):
        ROWS[name].active().setup(trainer, Classifier(), "fit")
    ROWS[name].active().setup(trainer, Classifier(), "test")


@pytest.mark.parametrize("name", ["DropoutInjection", "DropoutScheduler"])
def test_dropout_supports_deepspeed(name):
    trainer = types.SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), callbacks=[], max_epochs=1, max_steps=-1)
    callback = ROWS[name].active()
    callback.setup(trainer, Classifier(), "fit")
    assert callback.find(Classifier())


def test_progress_in_manual_optimization():
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([RecordedPenalty(Linear(0.0, 1.0))], Gan(lr=0.01), max_epochs=1)
    assert_close(seen, [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])
    seen.clear()
    fit([RecordedPenalty(Linear(0.0, 1.0))], Gan(lr=0.01), max_epochs=-1, max_steps=4)
    assert_close(seen, [0.0, 0.25, 0.5, 0.75])  # max_steps counts the steps of both optimizers
