"""When pruning happens, how much each part of a model is pruned, and zeros that were there before."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from helpers import QUIET, Classifier, Gan, Memory, digits, fit, loader, same
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_worker import Resumable
from table import ROWS
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg import (
    Cubic,
    Linear,
    MaxNorm,
    NonFiniteGradientGuard,
    NonNegative,
    SequentialSchedule,
    Steps,
    UnitNorm,
    WeightPruning,
    sparsity,
)
from lightning_reg.functional import pruning_masks

SIZES = {"net.0.weight": 1024, "net.4.weight": 160}
TOTAL = sum(SIZES.values())


class Stream(IterableDataset):
    """Digits without an end."""

    def __iter__(self):
        return itertools.cycle(zip(*digits(64), strict=True))


def stream():
    return DataLoader(Stream(), batch_size=16)


class Recorder(Classifier):
    """Records the number of zeros after each batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.zeros = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.zeros.append(sparsity(self).total.zeros)


def zeros_of(model):
    """Return the number of zeros in each weight."""
    return [count.zeros for count in sparsity(model).parameters.values()]


# After a number of steps --------------------------------------------------------------------------------------------


def test_prunes_right_after_each_nth_step():
    model = fit([WeightPruning(Steps([0.2, 0.6], at=["4st"]), every="3st")], Recorder())
    assert model.zeros == [0, 0, *[round(0.2 * TOTAL)] * 3, *[round(0.6 * TOTAL)] * 3]


def test_the_smallest_weights_at_that_step_are_pruned():
    class Keeps(Recorder):
        def optimizer_step(self, *args, **kwargs):
            self.before = [p.detach().clone() for p in (self.net[0].weight, self.net[4].weight)]
            super().optimizer_step(*args, **kwargs)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if batch_idx == 1:
                self.masks = [p == 0 for p in (self.net[0].weight, self.net[4].weight)]

    pruned = fit([WeightPruning(0.5, every="2st")], Keeps(), max_epochs=1, limit_train_batches=2)
    plain = fit([], Keeps(), max_epochs=1, limit_train_batches=2)
    expected = pruning_masks([plain.net[0].weight, plain.net[4].weight], 0.5)
    assert all(torch.equal(mask, other) for mask, other in zip(pruned.masks, expected, strict=True))


def test_prunes_endless_data():
    """The schedule counts steps, and the fit has one epoch that never ends."""
    model = fit([WeightPruning(Cubic(0.0, 0.5, until="10st"), every="1st")], Recorder(), stream(), max_epochs=-1, max_steps=14)
    expected = [round(Cubic(0.0, 0.5)(min(step / 10, 1.0)) * TOTAL) for step in range(1, 15)]
    assert model.zeros == expected


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_steps_are_optimizer_steps(accumulation):
    model = fit([WeightPruning(0.5, every="2st")], Recorder(), loader(64, 8), accumulate_grad_batches=accumulation)
    first = {1: 1, 2: 3, 3: 5}[accumulation]  # the batch in which the second step is taken
    assert model.zeros == [*[0] * first, *[TOTAL // 2] * (16 - first)]


def test_steps_of_all_optimizers_count_in_manual_optimization():
    class Both(Gan):
        zeros = ()

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()
                self.zeros = [*self.zeros, sparsity(self).total.zeros]

    model = fit([WeightPruning(0.5, every="3st")], Both(), max_epochs=1)
    assert model.zeros == [0, 0, *[TOTAL // 2] * 6]


@pytest.mark.parametrize("rewind", [None, 1, 3])
@pytest.mark.parametrize("every", ["3st", "1ep"])
def test_parameters_that_are_toggled_off_are_pruned_and_rewound(every, rewind):
    """Within a batch, ``toggle_optimizer`` freezes the parameters of the other optimizers."""

    class Both(Gan):
        toggles = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                if self.toggles:
                    self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()
                if self.toggles:
                    self.untoggle_optimizer(optimizer)

    class Toggles(Both):
        toggles = True

    def trained(kind):
        callbacks = [WeightPruning(Cubic(0.0, 0.8), every=every, rewind_to_step=rewind), UnitNorm(params="net.0.weight")]
        return fit(callbacks, kind(lr=0.1))

    assert same(trained(Toggles), trained(Both))
    assert sparsity(trained(Toggles)).total.zeros > TOTAL // 2


def test_steps_that_lightning_does_not_take_count():
    class Raw(Classifier):
        zeros = ()

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.zeros = [*self.zeros, sparsity(self).total.zeros]

    model = fit([WeightPruning(0.5, every="3st")], Raw())
    assert model.zeros == [0, 0, *[TOTAL // 2] * 6]


def test_a_skipped_step_is_made_up_for():
    """The step after which pruning is due is skipped, so the next one prunes."""

    class Poisoned(Recorder):
        def on_after_backward(self):
            if self.trainer.global_step == 1:
                self.net[4].bias.grad.fill_(math.nan)

    with pytest.warns(UserWarning, match="skip"):
        model = fit([WeightPruning(0.5, every="2st"), NonFiniteGradientGuard()], Poisoned(), max_epochs=1)
    assert model.zeros == [0, 0, TOTAL // 2, TOTAL // 2]


@pytest.mark.parametrize("constraint", [lambda: UnitNorm(params="net.0.weight"), lambda: MaxNorm(0.3), NonNegative])
def test_constraints_hold_right_after_pruning(constraint):
    rows = []

    class Looks(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            rows.append(self.net[0].weight.detach().clone())

    callback = constraint()
    fit([WeightPruning(Cubic(0.0, 0.8), every="1st"), callback], Looks())
    assert (rows[-1] == 0).float().mean() > 0.5
    for row in rows:
        norms = row.norm(dim=1)
        if isinstance(callback, UnitNorm):
            torch.testing.assert_close(norms, torch.ones_like(norms))
        else:
            assert norms.max() <= 0.3 + 1e-6 if isinstance(callback, MaxNorm) else row.min() >= 0


@pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)")
@pytest.mark.parametrize("rewind", [None, 2])
def test_a_resumed_run_prunes_after_the_same_steps(rewind, tmp_path):
    def run(folder, resume=None):
        model = Recorder()
        pruning = WeightPruning(Cubic(0.0, 0.8, until="12st"), every="4st", rewind_to_step=rewind)
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=12, callbacks=[pruning, saves])
        trainer.fit(model, Resumable(), ckpt_path=resume)
        return model

    whole = run(tmp_path)
    for at in (3, 4, 6, 9):
        resumed = run(tmp_path / "again", tmp_path / f"step={at}.ckpt")
        assert same(resumed, whole), at
        assert resumed.zeros == whole.zeros[at:]


@pytest.mark.filterwarnings("ignore:WeightPruning reaches a sparsity of only")
def test_a_second_fit_counts_its_own_steps():
    callback, model = WeightPruning(Steps([0.4, 0.6], at=["1ep"]), every="3st"), Recorder()
    fit([callback], model, max_epochs=1)
    fit([callback], model, max_epochs=2)
    assert model.zeros == [0, 0, *[round(0.4 * TOTAL)] * 7, *[round(0.6 * TOTAL)] * 3]


def test_rewinds_right_after_the_step():
    class Keeps(Recorder):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.trainer.global_step == 1:  # it still counts the steps before this one
                self.early = self.net[0].weight.detach().clone()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.states = len(self.optimizers().state)

    model = fit([WeightPruning(0.5, every="4st", rewind_to_step=2)], Keeps(lr=0.5), max_epochs=1)
    weight = model.net[0].weight
    assert torch.equal(weight[weight != 0], model.early[weight != 0])
    assert model.states == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "5ep"}, "never prunes: every='5ep', but the fit ends before the end of epoch 5"),
        ({"every": "9st"}, "never prunes: every='9st', but the fit ends before the end of step 9"),
        ({"max_steps": 3}, "never prunes: every='1ep', but the fit ends before the end of epoch 1"),
        ({"data": stream(), "max_epochs": -1, "max_steps": 3}, "if the data never end, it never prunes. Use steps, as in"),
        ({"data": stream(), "max_epochs": -1, "max_steps": 3, "every": "4st"}, "never prunes: every='4st'"),
        ({}, ""),
        ({"every": "8st"}, ""),
        ({"data": stream(), "max_epochs": -1, "max_steps": 3, "every": "3st"}, ""),
    ],
    ids=lambda value: ",".join(f"{key}={value[key]}" for key in value if key != "data") if isinstance(value, dict) else "",
)
def test_pruning_that_never_happens_warns(options, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fit(
            [WeightPruning(0.5, every=options.get("every", "1ep"))], **{k: v for k, v in options.items() if k != "every"}
        )
    found = [str(warning.message) for warning in caught if "prunes" in str(warning.message)]
    assert len(found) == bool(message)
    assert all(message in text for text in found)
    assert bool(sparsity(model).total.zeros) is not bool(message)


def test_a_schedule_that_the_last_step_does_not_reach_warns():
    with pytest.warns(
        UserWarning, match=r"reaches a sparsity of only 3\d\.\d\d%, not the final 50\.00%.* the last pruning is after 6 of 8"
    ):
        fit([WeightPruning(Linear(0.0, 0.5), every="6st")])


def test_of_many_prunings_some_are_planned():
    calls = []

    def schedule(progress):
        calls.append(progress)
        return 0.5 * progress

    with pytest.raises(ValueError, match=r"rewind_to_step=9 is after the first pruning"):
        fit([WeightPruning(schedule, every="1st", rewind_to_step=9)], max_epochs=10**6)
    assert len(calls) < 2000
    assert max(calls[1:-1]) == 1.0  # the last one


def test_rewinding_after_the_first_pruning_raises():
    with pytest.raises(ValueError, match="rewind_to_step=4 is after the first pruning, which happens after 3 batches"):
        fit([WeightPruning(0.5, every="3st", rewind_to_step=4)])


@pytest.mark.parametrize("every", [1, None, 2.5])
def test_every_of_another_type_raises(every):
    with pytest.raises(TypeError, match="every must be a whole number of epochs, as in '1ep', or of optimizer steps"):
        WeightPruning(0.5, every=every)


# Functions that fall ------------------------------------------------------------------------------------------------


def falls(progress):
    return 0.5 if progress < 0.6 else 0.4


@pytest.mark.parametrize("every", ["1ep", "3st"])
def test_a_function_that_falls_holds_its_maximum(every):
    callback, seen = WeightPruning(falls, every=every), []

    class Looks(Callback):
        def on_train_batch_start(self, *args):
            seen.append(callback.current["sparsity"])

    model = fit([callback, Looks()], Recorder(), max_epochs=3)
    assert model.zeros == [*[0] * (3 if every == "1ep" else 2), *[TOTAL // 2] * (9 if every == "1ep" else 10)]
    assert seen == [0.5] * 12


def test_a_layer_that_is_trained_late_gets_the_maximum():
    class Late(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].weight.requires_grad_(trainer.current_epoch == 2)

    model = fit([WeightPruning(falls), Late()], max_epochs=3)
    assert sparsity(model).total.zeros == TOTAL // 2


def test_a_function_that_falls_holds_under_unknown_length():
    model = fit([WeightPruning(falls, every="4st")], Recorder(), stream(), max_epochs=-1, max_steps=12)
    assert model.zeros[-1] == TOTAL // 2


# A sparsity for each part -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_pattern_has_its_own_total(scope):
    model = fit([WeightPruning({"net.0.*": 0.9, "net.4.*": Linear(0.0, 0.5)}, scope=scope)], Recorder())
    assert zeros_of(model) == [round(0.9 * 1024), 80]
    assert model.zeros[3] == round(0.9 * 1024) + 40


class Three(Classifier):
    """The model with one more layer in front, which is larger."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.front = nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return super().training_step((self.front(batch[0]), batch[1]), batch_idx)


def test_the_total_of_a_pattern_is_taken_from_all_its_tensors():
    """Exactly the smallest of both are pruned, and a tensor without a pattern is left alone."""
    plain = fit([], Three(), max_epochs=1)
    model = fit([WeightPruning({"net.*": 0.37})], Three(), max_epochs=1)
    expected = pruning_masks([plain.net[0].weight, plain.net[4].weight], 0.37)
    assert torch.equal(model.net[0].weight == 0, expected[0])
    assert torch.equal(model.net[4].weight == 0, expected[1])
    assert not (model.front.weight == 0).any()
    assert sum(int(mask.sum()) for mask in expected) == round(0.37 * TOTAL)


def test_a_mapping_of_one_pattern_equals_a_number():
    assert same(fit([WeightPruning({"*": Cubic(0.0, 0.8)})]), fit([WeightPruning(Cubic(0.0, 0.8))]))
    assert same(fit([WeightPruning({"weights": 0.5})]), fit([WeightPruning(0.5)]))


def test_values_and_metrics_have_the_names_of_patterns(capsys):
    logger, callback = Memory(), WeightPruning({"net.0.*": 0.9, "net.4.*": Linear(0.0, 0.5)})
    fit([callback], logger=logger, log_every_n_steps=1, enable_model_summary=True)
    assert callback.current == {"sparsity/net.0.*": 0.9, "sparsity/net.4.*": 0.5}
    name = "reg/WeightPruning"
    logged = {key: value for key, value in logger.steps[7].items() if key.startswith(name)}
    assert logged == pytest.approx(
        {
            f"{name}/sparsity/net.0.*": 0.9,
            f"{name}/sparsity/net.4.*": 0.5,
            f"{name}/pruned/net.0.*": 922 / 1024,
            f"{name}/pruned/net.4.*": 0.5,
            f"{name}/pruned": (922 + 80) / TOTAL,
        }
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "84.63% of 1,184 weights are pruned (target: 90.00% of net.0.*, 50.00% of net.4.*)" in printed


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"net.O.*": 0.5}, r"WeightPruning: .*no parameter has a name that matches 'net\.O\.\*'; close matches: .*net\.0"),
        ({"net.0.bias": 0.5}, r"the pattern 'net\.0\.bias' of sparsity matches only parameters that params=.* leaves out"),
        ({"net.*": 0.5, "net.4.*": 0.9}, r"two patterns of sparsity match 'net\.4\.weight': 'net\.\*' and 'net\.4\.\*'"),
        ({"net": 0.5}, r"it is a module: write 'net\.\*'"),
    ],
)
def test_patterns_that_do_not_fit_the_model_raise(mapping, message):
    model = Recorder()
    with pytest.raises(ValueError, match=message):
        fit([WeightPruning(mapping)], model)
    assert not model.zeros


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({}, ValueError, "sparsity must have at least one pattern"),
        ({"net.*": 1.0}, ValueError, r"sparsity/net\.\* must be a number in \[0, 1\), got 1\.0"),
        ({"net.*": Linear(0.5, 0.2)}, ValueError, r"sparsity/net\.\*=Linear.* decreases from 0\.5 to 0\.2"),
        ({"!net.*": 0.5}, ValueError, "selects no parameter: start with what to include"),
        ({nn.Linear: 0.5}, TypeError, "params must name parameters|must be text"),
    ],
)
def test_malformed_mappings_raise(mapping, error, message):
    with pytest.raises(error, match=message):
        WeightPruning(mapping)


def test_an_unreachable_sparsity_of_one_pattern_raises_before_training():
    with pytest.raises(ValueError, match=r"sparsity=0\.95 leaves 0\.05 of the weights, fewer than min_kept=0\.1"):
        fit([WeightPruning({"net.0.*": 0.5, "net.4.*": 0.95}, min_kept=0.1)])


def test_units_of_each_pattern():
    model = fit([WeightPruning({"net.0.*": 0.25, "net.4.*": 0.5}, structure="unit", params="weights")])
    dead = [int((p == 0).all(1).sum()) for p in (model.net[0].weight, model.net[4].weight)]
    assert dead == [4, 5]


def test_integers_are_patterns_too():
    class Plain(Classifier):
        def __init__(self):
            super().__init__()
            self.layers = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])

    with pytest.raises(ValueError, match="no parameter has a name that matches '3'"):
        fit([WeightPruning({3: 0.5})], Plain())


# Zeros that were there before ---------------------------------------------------------------------------------------


def sparse_model(fraction=0.7, kind=Recorder):
    """Return a model whose smallest weights are 0, as loaded from a checkpoint of pruned weights."""
    model = kind()
    params = [model.net[0].weight, model.net[4].weight]
    with torch.no_grad():
        for p, mask in zip(params, pruning_masks(params, fraction), strict=True):
            p.masked_fill_(mask, 0.0)
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


@pytest.mark.parametrize("sparsity_now", [0.0, 0.5])
def test_zeros_at_the_start_are_kept(sparsity_now, capsys):
    pruned, logger = round(0.7 * TOTAL), Memory()
    callback = WeightPruning(sparsity_now, keep_zeros=True)
    model = fit([callback], sparse_model(), logger=logger, log_every_n_steps=1, enable_model_summary=True)
    assert model.zeros == [pruned] * 8
    assert logger.steps[0]["reg/WeightPruning/pruned"] == pytest.approx(pruned / TOTAL)
    assert "70.02% of 1,184 weights are pruned" in capsys.readouterr().out
    forgets = fit([WeightPruning(sparsity_now)], sparse_model(), max_epochs=1)
    assert max(forgets.zeros[:3]) < 0.5 * TOTAL


def test_masks_grow_from_the_zeros():
    start = sparse_model(0.3)
    before = [p.detach() == 0 for p in (start.net[0].weight, start.net[4].weight)]
    model = fit([WeightPruning(0.6, keep_zeros=True)], start)
    assert model.zeros == [*[round(0.3 * TOTAL)] * 3, *[round(0.6 * TOTAL)] * 5]
    assert all((p[mask] == 0).all() for p, mask in zip((model.net[0].weight, model.net[4].weight), before, strict=True))


def test_zeros_that_training_makes_are_not_kept(tmp_path):
    """A resumed run has the masks of its checkpoint, not the zeros of its weights."""

    class Zeroes(Recorder):
        def on_train_epoch_end(self):
            if self.trainer.current_epoch == 0:
                self.net[0].weight.data[:, 20:30] = 0.0

    def run(epochs, resume=None):
        model = sparse_model(0.3, Zeroes)
        trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=[callback := WeightPruning(0.0, keep_zeros=True)])
        trainer.fit(model, loader(), ckpt_path=resume)
        return model, trainer, callback

    whole, *_ = run(2)
    _, trainer, callback = run(1)
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    resumed, _, again = run(2, tmp_path / "1.ckpt")
    assert same(resumed, whole)
    first, second = (cb.state_dict()["state"]["masks"] for cb in (callback, again))
    assert all(torch.equal(first[name][0], second[name][0]) for name in SIZES)


def test_tensors_of_zeros_only_are_left_out():
    """They were initialized so, as LoRA does, and must be trained."""
    model = sparse_model(0.3)
    nn.init.zeros_(model.net[4].weight)
    with pytest.warns(UserWarning, match=r"keep_zeros leaves out all-zero tensors, which may be new: net\.4\.weight"):
        fit([WeightPruning(0.0, keep_zeros=True)], model)
    assert (model.net[4].weight != 0).all()


def test_groups_of_four_with_more_zeros_stay():
    model = sparse_model(0.7)
    dead = model.net[0].weight.detach() == 0
    fit([WeightPruning(0.5, structure="2:4", params="net.0.weight", keep_zeros=True)], model)
    zeros = model.net[0].weight == 0
    assert zeros[dead].all()
    assert (zeros.view(16, 16, 4).sum(-1) >= 2).all()


@pytest.mark.parametrize("structure", ["unit", "element"])
def test_masks_are_for_weights_that_another_model_has_too(structure):
    """A callback that is used again takes the zeros of the new model."""
    callback = WeightPruning(0.0, keep_zeros=True, structure=structure, params="weights")
    fit([callback], sparse_model(0.7))
    model = fit([callback], sparse_model(0.2))
    assert model.zeros[-1] == round(0.2 * TOTAL)


def test_table_row_of_pruning_has_no_zeros_to_keep():
    """Without zeros, nothing changes."""
    expected = fit([ROWS["WeightPruning"].active()])
    assert same(fit([WeightPruning(0.5, keep_zeros=True)]), expected)


def test_a_sequence_of_schedules_prunes():
    schedule = SequentialSchedule([Linear(0.0, 0.4), Linear(0.4, 0.8)], at=["1ep"])
    model = fit([WeightPruning(schedule, every="2st")], Recorder())
    assert model.zeros[-1] == round(0.8 * TOTAL)
