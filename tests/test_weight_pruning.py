"""Pruning during training. Where Lightning's own ``ModelPruning`` fails, it is the negative control."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import optimizers
import pytest
import torch
from helpers import QUIET, Classifier, Gan, Memory, fit, loader, same, weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_reg import (
    WEIGHT_LAYERS,
    Cubic,
    Linear,
    MaxNorm,
    MinMaxNorm,
    NonNegative,
    SequentialSchedule,
    Steps,
    UnitNorm,
    WeightPruning,
    sparsity,
)
from lightning_reg._engine import _lightning
from lightning_reg._engine.steps import with_inner
from lightning_reg.functional import Units, pruning_masks
from lightning_reg.pruning.masks import unpack_bits

TOTAL = 64 * 16 + 16 * 10  # weights of the model


class Recorder(Classifier):
    """Records its sparsity after each step and in each validation. Several optimizers can train it."""

    def __init__(self, optimizer="sgd", **options):
        super().__init__(**options)
        self.kind = optimizer
        self.after_step, self.validated, self.norms = [], [], []

    def configure_optimizers(self):
        if self.kind == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return super().configure_optimizers()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after_step.append(sparsity(self).total.zeros)

    def validation_step(self, batch, batch_idx):
        self.validated.append(sparsity(self).total.zeros)
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))


def train(callbacks, model=None, max_epochs=3, **trainer):
    """Train with validation and return the model and its trainer."""
    model = model or Recorder()
    fitted_trainer = Trainer(**{**QUIET, "num_sanity_val_steps": 0, **trainer}, max_epochs=max_epochs, callbacks=callbacks)
    fitted_trainer.fit(model, loader(), loader())
    return model, fitted_trainer


def model_pruning(amount=0.5):
    return ModelPruning("l1_unstructured", amount=amount, use_lottery_ticket_hypothesis=False)


# Where ModelPruning fails --------------------------------------------------------------------------------------------


def validate_best_checkpoint(callback, folder):
    """Return the metric that the best checkpoint was saved with, and its value in a new validation."""
    best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1)
    train([callback, best], enable_checkpointing=True)
    plain = Recorder.load_from_checkpoint(best.best_model_path)
    (metrics,) = Trainer(**QUIET).validate(plain, loader(), verbose=False)
    return best.best_model_score.item(), metrics["val_loss"]


def test_best_checkpoint_revalidates_to_same_metric(tmp_path):
    saved, revalidated = validate_best_checkpoint(WeightPruning(0.9), tmp_path / "ours")
    assert revalidated == pytest.approx(saved, rel=1e-6)


def test_best_checkpoint_of_model_pruning_does_not_revalidate(tmp_path):
    """It prunes after validation. Its checkpoints load into the plain model only if pruning is made permanent."""
    callback = ModelPruning(
        "l1_unstructured",
        amount=0.9,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=True,
        parameter_names=["weight"],
    )
    saved, revalidated = validate_best_checkpoint(callback, tmp_path / "theirs")
    assert revalidated != pytest.approx(saved, rel=1e-3)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:Checkpoint directory .* exists")
def test_masks_survive_resume(tmp_path):
    """``test_resume.py`` has the full comparison, in new processes and mid-epoch."""

    def resumed(make, folder):
        def save():
            return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)

        train([make(), save()], enable_checkpointing=True, max_epochs=1)
        model = Recorder()
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[make(), save()])
        trainer.fit(model, loader(), ckpt_path=folder / "step=4.ckpt")
        return model.after_step[:3]

    def theirs():
        return ModelPruning("l1_unstructured", amount=0.75, use_lottery_ticket_hypothesis=False, make_pruning_permanent=True)

    assert resumed(lambda: WeightPruning(0.75), tmp_path / "ours") == [round(0.75 * TOTAL)] * 3
    assert max(resumed(theirs, tmp_path / "theirs")) < 0.2 * TOTAL


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_stay_zero_under_momentum(optimizer):
    model, _ = train([WeightPruning(Steps([0.6, 0.8], at=["2ep"]))], Recorder(optimizer), max_epochs=4)
    at_epoch = [0, round(0.6 * TOTAL), round(0.8 * TOTAL), round(0.8 * TOTAL)]
    during = [zeros for epoch in range(4) for zeros in model.after_step[4 * epoch : 4 * epoch + 3]]
    assert during == [zeros for zeros in at_epoch for _ in range(3)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masking_gradients_alone_does_not_keep_zeros(optimizer):
    """The negative control: it masks gradients, but not weights or optimizer state."""

    class ByHand(Recorder):
        def on_validation_start(self):
            self.masks = pruning_masks([self.net[0].weight, self.net[4].weight], 0.6)
            for p, mask in zip((self.net[0].weight, self.net[4].weight), self.masks, strict=True):
                p.data.masked_fill_(mask, 0.0)

        def on_before_optimizer_step(self, optimizer):
            for p, mask in zip((self.net[0].weight, self.net[4].weight), getattr(self, "masks", ()), strict=False):
                p.grad.masked_fill_(mask, 0.0)

    model, _ = train([], ByHand(optimizer), max_epochs=2)
    assert model.after_step[4] < 0.2 * TOTAL  # weights of pixels that are always 0 do not move


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA on epochs": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=1000, update_starting_at_epoch=1),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_weights_are_equally_sparse(average, first):
    callbacks = [WeightPruning(Linear(0.0, 0.8)), AVERAGES[average]()]
    model, _ = train(callbacks if first else callbacks[::-1], max_epochs=4)
    assert sparsity(model).total.zeros == round(0.8 * TOTAL)
    assert model.validated[3::4] == [round(fraction * TOTAL) for fraction in (0.2, 0.4, 0.6, 0.8)]
    reference, _ = train([WeightPruning(Linear(0.0, 0.8))], max_epochs=4)
    assert not same(model, reference)


class Batched(Recorder):
    """The model with batch normalization, for which weight averaging adds an epoch that only updates statistics."""

    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer)
        self.net[1] = nn.BatchNorm1d(16)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_keep_masks_and_norms_in_the_epoch_for_batch_normalization(first, optimizer):
    """At the end of this epoch, Lightning takes a step with earlier gradients, unless a validation clears them."""
    pruning = WeightPruning(Cubic(0.0, 0.5))
    callbacks = [pruning, MaxNorm(0.3), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]
    model, _ = train(callbacks if first else callbacks[::-1], Batched(optimizer), limit_val_batches=0)
    masks = sum(unpack_bits(*mask).sum().item() for mask in pruning.state_dict()["state"]["masks"].values())
    assert sparsity(model).total.zeros == masks == TOTAL // 2
    assert max(p.norm(dim=1).max() for p in (model.net[0].weight, model.net[4].weight)) <= 0.3 + 1e-6


@pytest.mark.parametrize("average", [name for name in ("EMA", "SWA") if name in AVERAGES])
def test_unmasked_averages_are_less_sparse(monkeypatch, average):
    monkeypatch.setattr(_lightning, "averaged_models", lambda trainer: [])
    monkeypatch.setattr(_lightning, "wrap_average_updates", lambda trainer, after: [])
    model, _ = train([WeightPruning(Linear(0.0, 0.8)), AVERAGES[average]()], max_epochs=4)
    assert sparsity(model).total.zeros < round(0.8 * TOTAL)


@pytest.mark.parametrize("average", [name for name in ("EMA", "SWA") if name in AVERAGES])
def test_model_pruning_loses_zeros_with_averaging(average):
    """Or fails, since its parameters differ from the average's in name and order."""
    alone = sparsity(train([model_pruning()], max_epochs=4)[0]).total.zeros
    try:
        together = sparsity(train([model_pruning(), AVERAGES[average]()], max_epochs=4)[0]).total.zeros
    except RuntimeError:
        together = 0
    assert together < alone / 2


def test_second_fit_keeps_masks_only_for_same_model():
    callback = WeightPruning(0.5)
    model, _ = train([callback])
    model.after_step.clear()
    train([callback], model)
    assert set(model.after_step) == {TOTAL // 2}
    assert same(train([callback])[0], train([WeightPruning(0.5)])[0])


def test_sparsity_does_not_compound():
    model, _ = train([WeightPruning(0.5)], max_epochs=4)
    assert model.validated[::4] == [TOTAL // 2] * 4
    theirs, _ = train([model_pruning()], max_epochs=4)
    assert (theirs.net[0].weight == 0).float().mean() > 0.9


# What it prunes -----------------------------------------------------------------------------------------------------


def test_sparsity_follows_schedule_at_each_validation():
    model, _ = train([WeightPruning(Cubic(0.0, 0.83, until=0.75))], max_epochs=4)
    expected = [round(Cubic(0.0, 0.83, until=0.75)(epoch / 4) * TOTAL) for epoch in (1, 2, 3, 4)]
    assert model.validated[::4] == expected
    assert expected[2] == expected[3] == round(0.83 * TOTAL)


def test_smallest_weights_at_end_of_epoch_are_pruned():
    class RecordsState(Recorder):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            self.last = weights(self)

    model, _ = train([WeightPruning(0.4)], RecordsState(), max_epochs=1)
    names = ["net.0.weight", "net.4.weight"]
    masks = pruning_masks([model.last[name] for name in names], 0.4)
    now = weights(model)
    for name, mask in zip(names, masks, strict=True):
        assert_close(now[name], model.last[name].masked_fill(mask, 0.0), rtol=0.0, atol=0.0)
    assert torch.equal(now["net.0.bias"], model.last["net.0.bias"])


def test_prunes_every_n_epochs():
    model, _ = train([WeightPruning(Linear(0.0, 0.8), every="2ep")], max_epochs=4)
    assert model.validated[::4] == [0, round(0.4 * TOTAL), round(0.4 * TOTAL), round(0.8 * TOTAL)]


def test_layer_scope_unit_structure_and_two_of_four():
    (layer, _), (unit, _), (pairs, _) = (
        train([WeightPruning(0.5, **options)], max_epochs=2)
        for options in ({"scope": "layer"}, {"structure": "unit", "scope": "layer", "params": "weights"}, {"structure": "2:4"})
    )
    assert [zeros for zeros, _ in sparsity(layer).parameters.values()] == [512, 80]
    assert [int((p == 0).all(1).sum()) for p in (unit.net[0].weight, unit.net[4].weight)] == [8, 5]
    assert [zeros for zeros, _ in sparsity(unit).parameters.values()] == [512, 80]
    for p in (pairs.net[0].weight, pairs.net[4].weight):
        assert ((p.view(-1, 4) == 0).sum(1) == 2).all()


def test_two_of_four_can_start_later():
    schedule = SequentialSchedule([0.0, Steps([0.0, 0.5], at=["1ep"])], at=["1ep"])
    model, _ = train([WeightPruning(schedule, structure="2:4")])
    assert model.validated[::4] == [0, TOTAL // 2, TOTAL // 2]


def test_custom_and_random_criteria():
    def last_columns_first(name, parameter):
        return -torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)

    model, _ = train([WeightPruning(0.5, criterion=last_columns_first, params="net.0.weight")], max_epochs=1)
    assert (model.net[0].weight.view(-1) == 0).tolist() == [False] * 512 + [True] * 512
    first, second, repeated = (
        sparsity(train([WeightPruning(0.5, criterion="random", name=name)], max_epochs=1)[0]) for name in ("a", "b", "a")
    )
    assert first == repeated
    assert first.total == second.total == (TOTAL // 2, TOTAL)
    assert first != second


def test_frozen_weights_are_not_pruned_or_counted():
    model = Recorder()
    model.net[0].weight.requires_grad_(False)
    trained, _ = train([WeightPruning(0.5)], model, max_epochs=1)
    assert [zeros for zeros, _ in sparsity(trained).parameters.values()] == [0, 80]


# Rewinding ----------------------------------------------------------------------------------------------------------


class Normed(Recorder):
    """The model with batch normalization. Records its state after each step and the size of the optimizer state per epoch."""

    def __init__(self, optimizer="sgd", **options):
        super().__init__(optimizer, **options)
        self.net.insert(1, nn.BatchNorm1d(16))
        self.history, self.states = [], []

    def on_train_start(self):
        self.history.append({key: value.clone() for key, value in self.state_dict().items()})

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.history.append({key: value.clone() for key, value in self.state_dict().items()})

    def on_validation_epoch_start(self):
        self.states.append(len(self.optimizers().state))
        self.at_validation = {key: value.clone() for key, value in self.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_rewinding_restores_masked_weights_of_step(optimizer, step):
    model, _ = train([WeightPruning(0.5, rewind_to_step=step)], Normed(optimizer), max_epochs=1)
    early, late = model.history[step], model.history[4]
    names = ["net.0.weight", "net.5.weight"]
    masks = dict(zip(names, pruning_masks([late[name] for name in names], 0.5), strict=True))
    for name, value in model.at_validation.items():
        expected = early[name].masked_fill(masks[name], 0.0) if name in masks else early[name]
        assert torch.equal(value, expected), name
    assert model.states == [0]
    assert not torch.equal(early["net.1.running_mean"], late["net.1.running_mean"])


def test_rewinds_only_when_more_is_pruned():
    model, _ = train([WeightPruning(Steps([0.3, 0.6], at=["3ep"]), rewind_to_step=0)], Normed("adamw"), max_epochs=4)
    assert [state > 0 for state in model.states] == [False, True, False, True]


def test_rewinding_restores_initial_optimizer_state():
    class Adagrad(Normed):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters(), lr=0.05, initial_accumulator_value=0.5)

        def on_validation_epoch_start(self):
            self.sums = [state["sum"].clone() for state in self.optimizers().state.values()]

    model, _ = train([WeightPruning(0.5, rewind_to_step=1)], Adagrad(), max_epochs=1)
    assert len(model.sums) == 8
    for state_sum, p in zip(model.sums, model.parameters(), strict=True):
        assert_close(state_sum, torch.full_like(p, 0.5).masked_fill(p == 0, 0.0) if p.ndim > 1 else torch.full_like(p, 0.5))


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


WRAPPERS = {
    "timm's Lookahead": lambda params: optimizers.TimmLookahead(adam(params)),
    "torch_optimizer's Lookahead": lambda params: optimizers.ClassicLookahead(adam(params)),
    "no optimizer by class": lambda params: optimizers.PlainWrapper(adam(params)),
    "wrapped twice": lambda params: optimizers.PlainWrapper(optimizers.ClassicLookahead(adam(params))),
    "several": lambda params: optimizers.Several([adam([p]) for p in params]),
}


@pytest.mark.parametrize("rewind", [None, 0, 2])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_state_of_wrapped_optimizers_is_cleared(kind, rewind):
    """A pruned weight has no momentum in any optimizer, and after rewinding nothing has."""

    class Wrapped(Recorder):
        def configure_optimizers(self):
            return WRAPPERS[kind](self.parameters())

        def on_validation_start(self):
            inner = [optimizer.state for optimizer in with_inner(self.optimizers(use_pl_optimizer=False))]
            self.states = [dict(state) for state in inner]

    model, _ = train([WeightPruning(0.5, rewind_to_step=rewind)], Wrapped(), max_epochs=1)
    assert len(model.states) == (7 if kind == "several" else 3 if kind == "wrapped twice" else 2)
    found = [(p, value) for state in model.states for p, values in state.items() for value in values.values()]
    assert bool(found) is (rewind is None)
    for p, value in found:
        if p.ndim == 2 and value.shape == p.shape:
            assert p.eq(0).any()
            assert not value[p == 0].any()


@pytest.mark.parametrize("step", [5, 7])
def test_rewinding_to_step_after_first_pruning_raises(step):
    with pytest.raises(ValueError, match=rf"rewind_to_step={step} is after the first pruning, which happens after 4 batches"):
        train([WeightPruning(0.5, rewind_to_step=step)])
    train([WeightPruning(Steps([0.0, 0.5], at=["2ep"]), rewind_to_step=step)])


class Late(Callback):
    """Trains only two biases in the first epoch."""

    def on_fit_start(self, trainer, pl_module):
        self.switch(pl_module, False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.switch(pl_module, True)

    def switch(self, pl_module, trained):
        for name, p in pl_module.named_parameters():
            p.requires_grad_(trained or name in ("net.1.bias", "net.5.bias"))


@pytest.mark.filterwarnings("ignore:WeightPruning has no effect for now")
@pytest.mark.parametrize("step", [2, 6])
def test_steps_without_selected_parameters_count(step):
    """All parameters go back to what they were at the step, also those that were frozen there."""
    model, _ = train([WeightPruning(Steps([0.0, 0.5], at=["2ep"]), rewind_to_step=step), Late()], Normed(lr=0.1), max_epochs=2)
    early, late = model.history[step], model.history[8]
    zeros = {name: value == 0 for name, value in model.at_validation.items()}
    assert sum(int(zeros[name].sum()) for name in ("net.0.weight", "net.5.weight")) == TOTAL // 2
    for name, value in model.at_validation.items():
        kept = ~zeros[name] if name in ("net.0.weight", "net.5.weight") else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], early[name][kept]), name
        assert not torch.equal(early[name], late[name]), name


@pytest.mark.parametrize("step", [1, 2, 5])
def test_steps_of_all_optimizers_count(step):
    """In manual optimization, those of an optimizer without selected parameters too."""

    class Recorded(Gan):
        def on_train_start(self):
            self.history = [self.net[4].weight.detach().clone()]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()
                self.history.append(self.net[4].weight.detach().clone())

        def validation_step(self, batch, batch_idx):
            self.validated = self.net[4].weight.detach().clone()

    model, _ = train([WeightPruning(0.5, params="net.4.weight", rewind_to_step=step)], Recorded(lr=0.1), max_epochs=1)
    kept = model.validated != 0
    assert kept.sum() == 80
    same_as = [index for index, past in enumerate(model.history) if torch.equal(model.validated[kept], past[kept])]
    assert step in same_as
    assert 8 not in same_as


def test_another_tensor_of_the_same_size_counts():
    """The total is that of the weights that are trained, not of others of the same number."""

    class Twin(Recorder):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(64, 16, bias=False)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net[1:](self.net[0](batch[0]) + self.twin(batch[0])), batch[1])

    class Switches(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            for p, epoch in ((pl_module.net[0].weight, 0), (pl_module.twin.weight, 1)):
                p.requires_grad_(trainer.current_epoch == epoch)
                p.grad = None

    model, _ = train([WeightPruning(0.5, params=["net.0.weight", "twin.weight"]), Switches()], Twin(), max_epochs=2)
    assert [count.zeros for count in sparsity(model, ["net.0.weight", "twin.weight"]).parameters.values()] == [512, 512]


def test_layer_that_is_replaced_is_pruned_again():
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[4] = nn.Linear(16, 10)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[4].parameters())})

    model, _ = train([WeightPruning(0.5, scope="layer"), Replaces()], max_epochs=2)
    assert [count.zeros for count in sparsity(model).parameters.values()] == [512, 80]


# Metrics and checkpoints --------------------------------------------------------------------------------------------


def test_metrics_and_final_report(capsys):
    logger = Memory()
    train([WeightPruning(Linear(0.0, 0.8))], logger=logger, log_every_n_steps=1, max_epochs=2, enable_model_summary=True)
    reached = [
        metrics["reg/WeightPruning/pruned"] for metrics in logger.steps.values() if "reg/WeightPruning/pruned" in metrics
    ]
    target = [
        metrics["reg/WeightPruning/sparsity"] for metrics in logger.steps.values() if "reg/WeightPruning/pruned" in metrics
    ]
    assert reached == pytest.approx([0, 0, 0, 0.4, 0.4, 0.4, 0.4, 0.8], abs=1 / TOTAL)
    assert target == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4, 0.5, 0.6, 0.8])
    assert "WeightPruning: 79.98% of 1,184 weights are pruned (target: 80.00%)" in capsys.readouterr().out
    train([WeightPruning(0.8)], max_epochs=1)
    assert "are pruned" not in capsys.readouterr().out


def test_checkpoint_has_one_bit_per_weight_and_no_new_names(tmp_path):
    model, trainer = train([WeightPruning(0.5)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    (state,) = (saved_state["state"] for saved_state in saved["callbacks"].values())
    assert sum(bits.numel() for bits, _ in state["masks"].values()) == TOTAL // 8
    for name, (bits, shape) in state["masks"].items():
        assert torch.equal(unpack_bits(bits, shape), model.state_dict()[name] == 0)
    assert saved["state_dict"].keys() == Recorder().state_dict().keys()


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan"), Linear(0.0, 1.0), Steps([0.1, 1.5], at=[0.5])])
def test_sparsity_out_of_range_raises(value):
    with pytest.raises(ValueError, match=r"WeightPruning: sparsity.* must be a number in \[0, 1\), got"):
        WeightPruning(value)


@pytest.mark.parametrize(
    "schedule",
    [Linear(0.5, 0.4), Cubic(0.5, 0.4), Steps([0.1, 0.5, 0.3], at=[0.2, 0.4]), SequentialSchedule([0.5, 0.4], at=[0.5])],
)
def test_decreasing_schedule_raises(schedule):
    with pytest.raises(ValueError, match=r"decreases from 0\.5 to 0\.[34], but pruned weights do not come back"):
        WeightPruning(schedule)


# What each tensor keeps ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of an inverted bottleneck, or of two plain convolutions."""

    def __init__(self, width, wide=0):
        super().__init__()
        convs = [(width, wide, 1, 1), (wide, wide, 3, wide), (wide, width, 1, 1)] if wide else [(width, width, 3, 1)] * 2
        layers = [
            nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False), nn.BatchNorm2d(o)) for i, o, k, g in convs
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return (x + self.layers(x)).relu()


def convolutional(wide):
    blocks = [Block(8, wide) for _ in range(3)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), *blocks, nn.Flatten(), nn.LazyLinear(10))


class Tokens(nn.Module):
    """Predicts from embedded tokens, through a transformer or an LSTM."""

    def __init__(self, kind):
        super().__init__()
        self.embedding, self.causal = nn.Embedding(200, 16), kind == "gpt"
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.body = (
            nn.LSTM(16, 16, batch_first=True) if kind == "lstm" else nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        hidden = self.embedding((x.abs() * 50).long().clamp(max=199))
        if isinstance(self.body, nn.LSTM):
            hidden, _ = self.body(hidden)
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
            for layer in self.body:
                hidden = layer(hidden, src_mask=mask)
        return self.head(hidden.mean(1))


ARCHITECTURES = {
    "MLP": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "ResNet": lambda: convolutional(0),
    "MobileNet": lambda: convolutional(24),
    "encoder": lambda: Tokens("encoder"),
    "LSTM": lambda: Tokens("lstm"),
    "GPT": lambda: Tokens("gpt"),
}


def architecture(kind, seed=0):
    torch.manual_seed(seed)
    model = Recorder()
    model.net = ARCHITECTURES[kind]()
    model.net(loader().dataset[:2][0])
    return model


@pytest.mark.filterwarnings("ignore:WeightPruning. at a sparsity of")
@pytest.mark.parametrize("gradual", [False, True], ids=["one-shot", "gradual"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_tensor_survives_and_total_is_exact(kind, gradual):
    for target in (0.8, 0.9, 0.95, 0.98):
        model, _ = train(
            [WeightPruning(Cubic(0.0, target, until="3ep") if gradual else target)], architecture(kind), max_epochs=3
        )
        counts = sparsity(model, ["weights", "!embeddings"])
        assert counts.total.zeros == round(target * counts.total.total), target
        for name, count in counts.parameters.items():
            assert count.total - count.zeros >= min(0.01, 1 - target) * count.total, (target, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_of_criterion_are_reduced_in_a_float32_copy(dtype, monkeypatch):
    """The reduction over ranks works in place."""
    seen = []
    monkeypatch.setattr(_lightning, "mean_over_ranks", lambda trainer, scores: seen.append(scores.dtype) or scores.mul_(0.5))
    model = Recorder()
    model.lr = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train([WeightPruning(0.5, criterion=lambda name, p: p.to(dtype))], model, max_epochs=1)
    assert set(seen) == {torch.float32}
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p[p != 0], old[p != 0])


@pytest.mark.filterwarnings("ignore:WeightPruning.* at a sparsity of")
def test_embeddings_are_left_out_by_default():
    """Their entries are far larger than those of other weights, or far smaller."""
    model, _ = train([WeightPruning(0.9)], architecture("encoder"), max_epochs=1)
    assert sparsity(model, "embeddings").total.zeros == 0
    with_embeddings, _ = train([WeightPruning(0.9, params="weights")], architecture("encoder"), max_epochs=1)
    assert sparsity(with_embeddings, "embeddings").total.zeros > 0


def test_without_minimum_layers_would_die():
    """The negative control: the lowest magnitudes of all tensors together include all of some."""
    model = architecture("encoder")
    counts = sparsity(model, "weights")
    masks = pruning_masks([dict(model.named_parameters())[name] for name in counts.parameters], 0.9)
    assert any(bool(mask.all()) for mask in masks)


def small_first_layer():
    model = Recorder()
    nn.init.uniform_(model.net[0].weight, 1e-6, 2e-6)
    model.lr = 0.0
    return model


@pytest.mark.parametrize(("min_kept", "kept"), [(0.01, 11), (0.05, 52), (0.0, 1)])
def test_protected_tensor_keeps_its_largest_weights(min_kept, kept):
    """With 1,024 of 1,184 weights tiny, 90% would take all of them."""
    model = small_first_layer()
    largest = model.net[0].weight.detach().abs().flatten().topk(kept).indices
    with pytest.warns(UserWarning, match=r"min_kept=.* protects weights in these tensors: net\.0\.weight\. The other") as seen:
        train([WeightPruning(Linear(0.9, 0.901), min_kept=min_kept)], model, max_epochs=3)
    assert len([w for w in seen if "min_kept" in str(w.message)]) == 1
    alive = model.net[0].weight.detach().flatten().nonzero().flatten()
    assert set(alive.tolist()) == set(largest.tolist())
    assert sparsity(model).total.zeros == round(0.901 * TOTAL)


def test_total_is_exact_with_ties_and_protected_tensors():
    model = Recorder()
    model.lr = 0.0
    nn.init.constant_(model.net[0].weight, 0.5)
    nn.init.constant_(model.net[4].weight, 0.5)
    with pytest.warns(UserWarning, match=r"min_kept=0\.02 protects weights in these tensors: net\.0\.weight"):
        train([WeightPruning(0.95, min_kept=0.02)], model, max_epochs=1)
    zeros = [count.zeros for count in sparsity(model).parameters.values()]
    assert zeros == [1024 - 21, round(0.95 * TOTAL) - (1024 - 21)]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_layer_keeps_a_unit(scope):
    model = small_first_layer()
    with pytest.warns(UserWarning, match=r"min_kept=0\.01 protects weights in these tensors: net\.0\.weight"):
        train([WeightPruning(0.97, structure="unit", scope=scope, params="weights")], model, max_epochs=1)
    for name in ("net.0.weight", "net.4.weight"):
        alive = dict(model.named_parameters())[name].detach().ne(0).any(1)
        assert int(alive.sum()) >= 1
    counts = sparsity(model).parameters["net.0.weight"]
    assert counts.total - counts.zeros == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.95, "min_kept": 0.1}, r"sparsity=0\.95 leaves 0\.05 of the weights, fewer than min_kept=0\.1 keeps"),
        ({"sparsity": 0.95, "min_kept": 0.1, "scope": "layer"}, r"fewer than min_kept=0\.1 keeps: lower one of the two"),
        ({"sparsity": 0.5, "min_kept": 0.6, "structure": "2:4"}, r"fewer than min_kept=0\.6 keeps: lower one of the two"),
        ({"sparsity": 0.9995}, r"sparsity=0\.9995 cannot be reached, .* leaves 1,182 of 1,184 weights to prune"),
    ],
)
def test_unreachable_sparsity_raises_before_training(options, message):
    model = Recorder()
    with pytest.raises(ValueError, match=message):
        train([WeightPruning(**options)], model)
    assert not model.after_step


class TransposedLinear(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Conv1D(TransposedLinear):
    """The same under Hugging Face's name."""


class Experts(nn.Module):
    """Stacked matrices, in a module of unknown type."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 6, 8))


@pytest.mark.parametrize("layer", [Conv1D, TransposedLinear])
def test_two_of_four_groups_the_inputs_of_each_layer(layer, monkeypatch):
    """Two of every four inputs are left. Along the outputs of a transposed layer, this does not hold."""
    if layer is TransposedLinear:
        monkeypatch.setitem(WEIGHT_LAYERS, "TransposedLinear", Units(1))

    class Model(Recorder):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), layer(12, 16), nn.ReLU(), nn.Linear(12, 10))
            self.conv, self.stacked = nn.Conv2d(8, 2, 4), Experts()

    model, _ = train([WeightPruning(0.5, structure="2:4")], Model())
    rows = {
        "linear": model.net[0].weight,
        "transposed": model.net[2].weight.t(),
        "convolution": model.conv.weight.permute(0, 2, 3, 1),
        "stacked": model.stacked.experts,
    }
    for name, weight in rows.items():
        zeros = (weight == 0).unflatten(-1, (-1, 4)).sum(-1)
        assert bool((zeros == 2).all()), name
    along_outputs = (model.net[2].weight == 0).unflatten(-1, (-1, 4)).sum(-1)
    assert not bool((along_outputs == 2).all())


def test_unsupported_two_of_four_raises():
    class Narrow(Recorder):
        def __init__(self):
            super().__init__()
            self.extra = nn.Conv2d(6, 4, 4)

    with pytest.raises(ValueError, match=r"multiple of 4, got extra\.weight of shape \(4, 6, 4, 4\): exclude such layers"):
        train([WeightPruning(0.5, structure="2:4")], Narrow())
    for value in (0.6, Linear(0.0, 0.5), Steps([0.25, 0.5], at=[0.5]), SequentialSchedule([0, Linear(0.0, 0.5)], at=[0.5])):
        with pytest.raises(ValueError, match=r"sparsity must be 0\.5, or step from 0 to 0\.5 as in Steps"):
            WeightPruning(value, structure="2:4")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            lambda name, p: p.sum(1),
            r"for 'net\.0\.weight' .* got scores of shape \(16,\), expected \(16, 64\)",
        ),
        (lambda name, p: p * torch.nan, r"for 'net\.0\.weight' .* got 1024 scores that are infinite or NaN"),
        (lambda name, p: 3.0, r"for 'net\.0\.weight' .* got 3\.0 of type float"),
    ],
    ids=["wrong shape", "NaN", "float"],
)
def test_invalid_scores_raise(scores, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train([WeightPruning(0.5, criterion=scores)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "l1"}, "criterion must be 'magnitude', 'random' or a callable .*, got 'l1'"),
        ({"scope": "model"}, "scope must be 'global' or 'layer', got 'model'"),
        ({"structure": "1:2"}, "structure must be 'element', 'unit' or '2:4', got '1:2'"),
        ({"every": "0ep"}, "every must be a whole number of epochs, as in '1ep', or of optimizer steps, .*, got '0ep'"),
        ({"every": "1.5ep"}, r"every must be a whole number .*, got '1\.5ep'"),
        ({"every": "2 epochs"}, "every must be a whole number .*, got '2 epochs'"),
        ({"structure": "unit"}, r"structure='unit' needs params that leave out the output layer"),
        ({"min_kept": 1.0}, r"min_kept must be a number in \[0, 1\), got 1\.0"),
        ({"rewind_to_step": -1}, "rewind_to_step must be an integer ≥ 0, got -1"),
        ({"rewind_to_step": True}, "rewind_to_step must be an integer ≥ 0, got True"),
    ],
)
def test_arguments_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=f"WeightPruning: {message}"):
        WeightPruning(0.5, **options)


class Wider(Classifier):
    def __init__(self):
        super().__init__()
        self.net[4] = nn.Linear(16, 12)


class Renamed(Classifier):
    def __init__(self):
        super().__init__()
        self.head, self.net[4] = self.net[4], nn.Identity()

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(self.net(batch[0])), batch[1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wider, r"a mask of shape \(10, 16\) for 'net\.4\.weight', which has shape \(12, 16\) here"),
        (Renamed, r"a mask of shape \(10, 16\) for 'net\.4\.weight', which is not selected here"),
    ],
)
def test_masks_of_other_model_raise(model, message):
    first = WeightPruning(0.5)
    train([first], max_epochs=1)
    resumed = WeightPruning(0.5)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=message):
        fit([resumed], model())


def test_checkpoint_of_other_shape_raises(tmp_path):
    """Lightning raises the error, since it loads the weights first."""
    _, trainer = train([WeightPruning(0.5)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.4\.weight"):
        Trainer(**QUIET, max_epochs=2, callbacks=[WeightPruning(0.5)]).fit(Wider(), loader(), ckpt_path=tmp_path / "model.ckpt")


def test_flattened_parameters_raise(monkeypatch):
    monkeypatch.setattr(_lightning, "uses_fsdp1", lambda trainer: True)
    with pytest.raises(
        ValueError, match=r"WeightPruning does not work with the flattened parameters of FSDPStrategy: use Model"
    ):
        fit([WeightPruning(0.5)])
    monkeypatch.undo()

    class Trained:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    assert _lightning.uses_fsdp1(Trained())


def norms_of(model):
    return torch.cat([model.net[i].weight.norm(dim=1) for i in (0, 4)])


class Validated(Classifier):
    """Records its weights in each validation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def validation_step(self, batch, batch_idx):
        if not batch_idx:
            self.seen.append(copy.deepcopy(self.net))


def fit_validated(callbacks, **options):
    model = Validated()
    Trainer(**{**QUIET, "max_epochs": 3, **options}, callbacks=callbacks).fit(model, loader(), loader())
    return model


@pytest.mark.parametrize(
    ("callbacks", "holds"),
    [
        ([UnitNorm(), WeightPruning(Linear(0.0, 0.8))], lambda net: norms_of(net).sub(1).abs().max() < 1e-5),
        ([MaxNorm(0.3), WeightPruning(Linear(0.0, 0.2), rewind_to_step=0)], lambda net: norms_of(net).max() < 0.3001),
        ([NonNegative(), WeightPruning(0.2, rewind_to_step=0)], lambda net: min(net.net[i].weight.min() for i in (0, 4)) >= 0),
    ],
    ids=["UnitNorm", "MaxNorm", "NonNegative"],
)
def test_constraints_hold_in_validation_after_pruning(callbacks, holds):
    model = fit_validated(callbacks)
    for net in model.seen[1:]:  # the first is Lightning's sanity check
        assert holds(SimpleNamespace(net=net))
    assert sparsity(model).total.zeros >= round(callbacks[1].current["sparsity"] * TOTAL)


class Orthogonalized(Recorder):
    """Trained by an optimizer that moves pruned weights too, since it orthogonalizes the whole update."""

    def configure_optimizers(self):
        weights_only = [p for p in self.parameters() if p.ndim == 2]
        return torch.optim.Muon(weights_only, lr=0.02, weight_decay=0.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.norms.append(norms_of(self).clone())


@pytest.mark.parametrize("bound", [UnitNorm(), MinMaxNorm(1.0, 1.0)], ids=["UnitNorm", "MinMaxNorm"])
def test_norms_are_those_of_the_weights_that_remain(bound):
    model, _ = train([bound, WeightPruning(0.5)], Orthogonalized(), max_epochs=3)
    norms = torch.stack(model.norms)
    assert_close(norms, torch.ones_like(norms), rtol=0.0, atol=1e-6)
    assert sparsity(model).total.zeros == TOTAL // 2


@pytest.mark.parametrize("name", ["a", "z"])
def test_rewinding_keeps_weights_pruned_by_other_callback(name):
    callbacks = [
        WeightPruning(0.5, params="net.0.weight", name=name),
        WeightPruning(0.25, params="net.4.weight", name="b", rewind_to_step=0),
    ]
    parameters = sparsity(fit_validated(callbacks, max_epochs=1)).parameters
    assert (parameters["net.0.weight"].zeros, parameters["net.4.weight"].zeros) == (512, 40)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_prunes_after_epoch_with_skipped_last_batch():
    class NoLoss(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    assert sparsity(fit([WeightPruning(0.5)], NoLoss(), max_epochs=1)).total.zeros == TOTAL // 2


def test_unreached_sparsity_warns():
    with pytest.warns(
        UserWarning, match=r"reaches a sparsity of only 53.33%, not the final 80.00% .*: the last pruning is after 4 of 6"
    ):
        fit([WeightPruning(Linear(0.0, 0.8))], max_epochs=-1, max_steps=6)


def test_masks_of_other_structure_raise(tmp_path):
    trainer = Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[WeightPruning(0.5)])
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Trainer(
        **{**QUIET, "max_epochs": 2}, callbacks=[WeightPruning(0.5, structure="unit", params="weights", name="WeightPruning")]
    )
    with pytest.raises(ValueError, match="masks have structure='element', got structure='unit': resume with the same"):
        again.fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_optimizer_state_of_pruned_weights_is_zero():
    class RecordsState(Classifier):
        def configure_optimizers(self):
            self.optimizer = super().configure_optimizers()
            return self.optimizer

    model = fit([WeightPruning(0.5)], RecordsState(), max_epochs=2)
    for i in (0, 4):
        weight = model.net[i].weight
        assert not model.optimizer.state[weight]["momentum_buffer"][weight == 0].any()
        assert model.optimizer.state[weight]["momentum_buffer"].any()


def test_masks_apply_before_first_batch_of_resumed_run():
    callback = WeightPruning(0.5)
    fit([callback], max_epochs=1)

    class RecordsSparsity(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.first = getattr(self, "first", sparsity(self).total.zeros)

    resumed = WeightPruning(0.5)
    resumed.load_state_dict(callback.state_dict())
    model = RecordsSparsity()
    fit([resumed], model, max_epochs=1)
    assert model.first == TOTAL // 2


def test_model_with_zero_weights_does_not_inherit_masks():
    class Zeros(Classifier):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[4].weight)

    callback = WeightPruning(0.5, params="net.4.weight")
    fit([callback], Zeros())
    assert same(fit([callback], Zeros()), fit([WeightPruning(0.5, params="net.4.weight")], Zeros()))
