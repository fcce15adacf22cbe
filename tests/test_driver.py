"""What the callbacks share: metrics, the summary, names, and what a run may forbid."""

from __future__ import annotations

import math
import types

import pytest
import torch
from helpers import Classifier, fit, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy
from table import ROWS, everything
from torch.testing import assert_close

from lightning_reg import (
    DropoutInjection,
    GradientNormClipping,
    GradientValueClipping,
    L1Penalty,
    L2Penalty,
    Linear,
    PeakGradientDropping,
    RandomShrinkage,
    Steps,
    WeightClipping,
    host,
)


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def logged(callbacks, model=None, **kwargs):
    logger = Memory()
    fit(callbacks, model, logger=logger, **{"log_every_n_steps": 1, **kwargs})
    return {step: {k: v for k, v in metrics.items() if k.startswith("reg/")} for step, metrics in logger.steps.items()}


class Watch(Classifier):
    """Recomputes by hand what the callbacks log."""

    def on_train_start(self):
        self.l1, self.norm = [], []

    def on_before_backward(self, loss):
        self.l1.append(sum(self.net[i].weight.detach().abs().sum().item() for i in (0, 4)))

    def on_after_backward(self):
        self.norm.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters())))


def test_penalties_log_their_value_and_strength_on_both_routes():
    for route in ("loss", "gradient"):
        model = Watch()
        steps = logged([L1Penalty(Linear(0.0, 0.08), inject=route)], model, max_epochs=2)
        strengths = [0.01 * i for i in range(8)]
        assert [m["reg/L1Penalty/strength"] for m in steps.values()] == pytest.approx(strengths)
        values = [m.get("reg/L1Penalty/penalty", 0.0) for m in steps.values()]
        assert values == pytest.approx([s * l1 for s, l1 in zip(strengths, model.l1, strict=True)], rel=1e-5)


def test_norm_clipping_logs_norms_and_how_often_it_clips():
    model = Watch()
    steps = logged([GradientNormClipping(1.0)], model, max_epochs=2)
    before = [m["reg/GradientNormClipping/norm_before"] for m in steps.values()]
    assert before == pytest.approx(model.norm, rel=1e-5)
    assert [m["reg/GradientNormClipping/norm_after"] for m in steps.values()] == pytest.approx(
        [min(n, 1) for n in before], rel=1e-5
    )
    assert [m["reg/GradientNormClipping/clipped_steps"] for m in steps.values()] == [float(n > 1) for n in before]
    assert {n > 1 for n in before} == {True, False}


def test_the_fraction_of_clipped_steps_is_over_the_steps_since_the_last_log():
    model = Watch()
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
        "reg/GradientValueClipping/norm_before",
        "reg/GradientValueClipping/norm_after",
        "reg/WeightClipping/clip_value",
        "reg/WeightClipping/constrained",
        "reg/DropoutInjection-ReLU/p",
        "reg/RandomShrinkage/epsilon",
        "reg/L2Penalty/strength",
        "reg/L2Penalty/penalty",
    }
    assert first["reg/PeakGradientDropping/norm_before"] > first["reg/PeakGradientDropping/norm_after"]
    assert first["reg/PeakGradientDropping/norm_after"] == first["reg/GradientValueClipping/norm_before"]
    assert 0 < first["reg/GradientValueClipping/clipped_entries"] < 1
    assert 0 < first["reg/WeightClipping/constrained"] < 1


def test_metrics_come_on_logging_steps_and_can_be_monitored():
    assert list(logged([L1Penalty(0.1)], max_epochs=2, log_every_n_steps=3)) == [2, 5]
    assert list(logged([L1Penalty(0.1)], max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=2)) == [0, 1, 2, 3]
    fit(
        [L1Penalty(0.1), EarlyStopping("reg/L1Penalty/penalty", check_on_train_epoch_end=True)],
        logger=Memory(),
        log_every_n_steps=1,
    )


def test_without_a_logger_nothing_is_measured():
    class Silent(GradientNormClipping):
        def observe(self, **metrics):
            raise AssertionError("measured")

        average = observe

    fit([Silent(0.1)])


def summary(capsys, callbacks, model=None):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, callbacks=callbacks)
    trainer.fit(model or Classifier(), loader())
    return capsys.readouterr().out


def test_the_summary_says_what_acts_on_what(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    table = summary(
        capsys, [WeightClipping(0.5), L1Penalty(Linear(0.0, 0.1, until="3ep")), GradientNormClipping(1.0, params="net.0.*")]
    )
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in table.splitlines()
        if "│" in line and ("Penalty" in line or "Clip" in line)
    ]
    assert rows == [
        ["L1Penalty", "2 tensors, 1,184 parameters", "strength=Linear(0.0, 0.1, until='3ep')", "loss"],
        ["GradientNormClipping-net_0", "2 tensors, 1,040 parameters", "max_norm=1.0", "before the step"],
        ["WeightClipping", "2 tensors, 1,184 parameters", "clip_value=0.5", "after the step"],
    ]
    assert table.count("Regularization") == 1


def test_the_summary_can_be_turned_off(capsys):
    fit(everything(), enable_model_summary=False, max_epochs=1)
    assert "Regularization" not in capsys.readouterr().out


def test_names_say_what_a_callback_acts_on():
    assert L1Penalty(0.1).name == "L1Penalty"
    assert L1Penalty(0.1, params=["encoder.*", "!*.bias"]).name == "L1Penalty-encoder-bias"
    assert L1Penalty(0.1, params="all").name == "L1Penalty-all"
    assert L1Penalty(0.1, name="sparsity").name == "sparsity"
    assert L1Penalty(0.1, name="sparsity").state_key == "L1Penalty{'name': 'sparsity'}"


class Unfreezes(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_parameters_that_are_unfrozen_later_are_regularized_from_then_on():
    class Counts(Classifier):
        def on_train_start(self):
            self.counts = []

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.counts.append((self.net[0].weight.abs().max() <= 0.05).item())

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    model = fit([WeightClipping(0.05), Unfreezes()], Counts())
    assert model.counts == [False] * 4 + [True] * 4


def test_steps_cannot_be_counted_while_accumulation_varies():
    varying = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match=r"'3st' cannot be placed: accumulate_grad_batches varies"):
        fit([L1Penalty(Steps([0.0, 0.1], at=["3st"])), varying])
    fit([L1Penalty(Steps([0.0, 0.1], at=["1ep"])), varying])


def test_the_plan_of_a_run():
    class Planned(Classifier):
        def on_train_start(self):
            plan = host.plan(self.trainer)
            self.plan = (plan.total, plan.per_epoch, plan.per_step)

    assert fit(model=Planned(), max_epochs=3).plan == (12, 4, 1)
    assert fit(model=Planned(), max_epochs=3, accumulate_grad_batches=3).plan == (12, 4, 3)
    assert fit(model=Planned(), max_epochs=3, accumulate_grad_batches=3, max_steps=3).plan == (7, 4, 3)
    assert fit(model=Planned(), max_epochs=-1, max_steps=3).plan == (3, 4, 1)
    assert fit(model=Planned(), max_epochs=3, limit_train_batches=2).plan == (6, 2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GradientNormClipping", r"GradientNormClipping cannot work under DeepSpeed: set Trainer\(gradient_clip_val=…\)"),
        ("GradientValueClipping", r"cannot work under DeepSpeed: its engine clips by norm only"),
        ("L1Penalty", "cannot work under DeepSpeed: add the penalty to the loss in training_step"),
        ("WeightClipping", "cannot work under DeepSpeed: use DDP or FSDP2"),
    ],
)
def test_deepspeed_is_refused_with_what_to_do_instead(name, message):
    trainer = types.SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), callbacks=[])  # it cannot run on a CPU
    with pytest.raises(ValueError, match=message):
        ROWS[name].active().setup(trainer, Classifier(), "fit")
    ROWS[name].active().setup(trainer, Classifier(), "test")


@pytest.mark.parametrize("name", ["DropoutInjection", "DropoutScheduler"])
def test_dropout_works_under_deepspeed_too(name):
    trainer = types.SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), callbacks=[], max_epochs=1, max_steps=-1)
    ROWS[name].active().setup(trainer, Classifier(), "fit")


def test_progress_does_not_run_over_in_manual_optimization():
    seen = []

    class Both(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (0, 4)]

    class Seen(L1Penalty):
        def gradients(self, params, optimizer):
            seen.append(self.current["strength"])

    fit([Seen(Linear(0.0, 1.0))], Both(), max_epochs=1)
    assert_close(seen, [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75])
    seen.clear()
    fit([Seen(Linear(0.0, 1.0))], Both(), max_epochs=-1, max_steps=4)
    assert_close(seen, [0.0, 0.0, 0.5, 0.5])
