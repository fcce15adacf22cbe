"""Comparisons: the law of identical candidates, real training, failed runs, and bad input."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import rich.console
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_reg import Cosine, DropoutInjection, L2Penalty, MaxNorm, WeightPruning
from lightning_reg.tuning import compare
from lightning_reg.tuning.results import Difference, difference, paired_differences
from lightning_reg.tuning.storage import RunsFailedError

NAMES = ("plain", "other")


class Linear(LightningModule):
    """A linear regression that logs the loss of its training and validation data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch):
        return self._loss(batch, "train/loss")

    def validation_step(self, batch):
        self._loss(batch, "val/loss")

    def _loss(self, batch, name):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(1), targets)
        self.log(name, loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loaders(split, train=48, val=12):
    """Return a new sample for each split, and shuffle the training data."""
    generator = torch.Generator().manual_seed(split)
    inputs = torch.randn(train + val, 4, generator=generator)
    data = TensorDataset(inputs, inputs.sum(1) + torch.randn(train + val, generator=generator))
    parts = torch.utils.data.Subset(data, range(train)), torch.utils.data.Subset(data, range(train, train + val))
    return DataLoader(parts[0], batch_size=8, shuffle=True), DataLoader(parts[1], batch_size=8)


TRAINER = {"max_epochs": 2, "accelerator": "cpu"}


def real(candidates, **options):
    given = {"model": Linear, "data": loaders, "metric": "val/loss", "repeats": 3, "trainer": TRAINER, "progress": False}
    return compare(candidates=candidates, **{**given, **options})


def synthetic(run, candidates=NAMES, **options):
    """Compare with a function of the candidate's name in place of training."""
    marked = {name: [Marked(name)] for name in candidates}
    return compare(
        None,
        None,
        marked,
        run=lambda callbacks, split, seed: run(callbacks[0].name, split),
        **{"overlap": 0.25, "progress": False, **options},
    )


class Marked(Callback):
    """A callback with a name."""

    def __init__(self, name):
        self.name = name


@pytest.mark.slow
def test_one_of_two_identical_candidates_is_rarely_called_better():
    """At most 31 of 400, even if each split is fresh data, so that the test has its full level of 5%."""
    for overlap, most in ((0.0, 31), (0.25, 8)):
        better = 0
        for study in range(400):
            numbers = np.random.default_rng([study, int(overlap * 100)])
            result = synthetic(lambda name, split, numbers=numbers: numbers.normal(), mode="max", overlap=overlap)
            better += result.verdict == "better"
        assert better <= most
        assert better >= 9 or overlap  # the test is not blind: about 20 are expected


def test_a_clear_gain_is_found_in_both_modes():
    gains = {"plain": 0.0, "other": 3.0}
    for mode, sign in (("max", 1), ("min", -1)):
        result = synthetic(
            lambda name, split, sign=sign: sign * gains[name] + random.Random(f"{name}{split}").gauss(0, 1), mode=mode
        )
        assert result.verdict == "better"
        assert result.best == "other"
        assert result.callbacks[0].name == "other"
        assert result.differences["other"].mean > 2


def test_several_candidates_are_corrected_by_holm():
    """Each of four has a p-value that is below 5% alone, and above with the correction."""
    offsets = [0.5, 1.5, 0.4, 1.6, 1.0]

    def run(name, split):
        return offsets[split] if name != "plain" else 0.0

    alone = synthetic(run, ("plain", "a"), mode="max", repeats=5).differences["a"]
    together = synthetic(run, ("plain", "a", "b", "c", "d"), mode="max", repeats=5).differences
    assert alone.p_value < 0.05 < together["a"].p_value
    assert all(found.p_value == pytest.approx(4 * alone.p_value) for found in together.values())
    assert together["a"].verdict == "undecided"


def test_candidates_that_do_nothing_are_plain():
    result = real({"plain": [], "inactive": [MaxNorm(1e9)]})
    assert result.differences["inactive"] == difference([0.0] * 3, 0.25, result.rope)
    assert (result.verdict, result.callbacks) == ("plain", [])


def test_a_run_is_what_a_trainer_does_by_hand():
    callbacks = [L2Penalty(0.5), DropoutInjection(0.5, after="Linear")]
    result = real({"plain": [], "both": callbacks}, seed=7)
    for split, found in enumerate(result.runs["both"]):
        seed_everything(7 + split, verbose=False)
        trainer = Trainer(
            **TRAINER, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=copy.deepcopy(callbacks)
        )
        model = Linear()
        trainer.fit(model, *loaders(split))
        assert found.value == trainer.callback_metrics["val/loss"].item()
        assert found.seconds > 0
    assert result.overlap == 12 / 48
    plain, both = ([run.value for run in result.runs[key]] for key in ("plain", "both"))
    assert result.differences["both"].mean == pytest.approx(np.mean(np.subtract(plain, both)))
    assert result.rope == pytest.approx(np.std(plain, ddof=1) / 2)
    assert list(result.to_dataframe()["val/loss"]) == [*plain, *both]


def test_callbacks_and_random_numbers_of_the_caller_are_left_alone():
    callback = WeightPruning(0.5)
    before = copy.deepcopy(callback.state_dict())
    seed_everything(3, verbose=False)
    expected = torch.rand(3), random.random()
    seed_everything(3, verbose=False)
    real({"plain": [], "pruned": [callback]})
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert callback.state_dict() == before


def test_callbacks_of_the_trainer_are_part_of_every_run():
    seen = []

    class Spy(Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append([type(callback).__name__ for callback in trainer.callbacks])

    real({"plain": [], "l2": [L2Penalty(1e-3)]}, trainer={**TRAINER, "callbacks": Spy()})
    assert sum("L2Penalty" in names for names in seen) == 3
    assert sum("Spy" in names for names in seen) == 6
    assert not any("ModelCheckpoint" in names for names in seen)


@pytest.mark.parametrize(
    ("options", "overlap"),
    [({}, 12 / 48), ({"limit_train_batches": 4}, 12 / 32), ({"limit_val_batches": 1, "limit_train_batches": 0.5}, 8 / 24)],
)
def test_samples_are_counted_as_the_run_takes_them(options, overlap):
    result = real({"plain": [], "l2": [L2Penalty(1e-3)]}, trainer={**TRAINER, **options})
    assert result.overlap == pytest.approx(overlap)


class Stream(IterableDataset):
    def __init__(self, split):
        self.split = split

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.split)
        for _ in range(16):
            yield torch.randn(4, generator=generator), torch.randn((), generator=generator)


def stream(split):
    return DataLoader(Stream(split), batch_size=8), DataLoader(Stream(split + 100), batch_size=8)


def test_unknown_sizes_need_an_overlap():
    with pytest.raises(ValueError, match=r"sizes of the training and validation data are unknown: pass overlap="):
        real({"plain": [], "l2": [L2Penalty(1e-3)]}, data=stream)
    assert real({"plain": [], "l2": [L2Penalty(1e-3)]}, data=stream, overlap=0).overlap == 0


def test_a_pair_with_a_failed_run_is_no_evidence():
    assert paired_differences([math.nan, 2.0, 3.0], [1.0, 1.0, 1.0], "max") == [0.0, 1.0, 2.0]
    assert paired_differences([5.0, 2.0, 3.0], [math.nan, 3.0, 1.0], "max") == [-1.0, -1.0, 2.0]

    def run(name, split):
        if name == "other" and split % 2:
            raise FloatingPointError("diverged")
        return 5 + split / 10 if name == "other" else split / 10

    result = synthetic(run, mode="max", repeats=6)
    assert result.verdict == "undecided"
    assert synthetic(lambda name, split: run(name, 2 * split), mode="max", repeats=6).verdict == "better"
    failed = [run for run in result.runs["other"] if run.error]
    assert len(failed) == 3
    assert "FloatingPointError: diverged" in failed[0].error
    assert "(3 failed)" in str([list(column.cells) for column in result.table().columns])


def test_a_metric_that_is_not_finite_is_a_failed_run():
    result = synthetic(lambda name, split: math.nan if (name, split) == ("other", 1) else float(split))
    assert result.runs["other"][1].error == "the metric is nan"


def test_three_failed_runs_in_a_row_end_the_comparison():
    calls = []

    def run(name, split):
        calls.append((name, split))
        raise ZeroDivisionError("no data")

    with pytest.raises(RunsFailedError, match=r"3 runs failed in a row(?s:.)*ZeroDivisionError: no data"):
        synthetic(run)
    assert len(calls) == 3


def test_the_yaml_trains_the_same_callbacks(tmp_path):
    callbacks = [L2Penalty(Cosine(0.1, 0.2), params=["weights", "!net.*"], name="decay"), DropoutInjection(0.5, after="Linear")]
    result = synthetic(lambda name, split: {"plain": 0.0, "other": 1.0}[name] + split % 2, mode="max")
    result.callbacks = callbacks
    result.to_yaml(tmp_path / "new" / "reg.yaml")
    config = yaml.safe_load((tmp_path / "new" / "reg.yaml").read_text())
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    made = parser.instantiate_classes(parser.parse_object({"callbacks": config["trainer"]["callbacks"]}))
    assert repr(made.callbacks) == repr(callbacks)
    result.to_csv(tmp_path / "runs.csv")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 21


def test_a_callback_that_yaml_cannot_express_is_named(tmp_path):
    result = synthetic(lambda name, split: {"plain": 0.0, "other": 1.0}[name] + split % 2, mode="max")
    result.callbacks = [L2Penalty(lambda progress: progress)]
    with pytest.raises(TypeError, match="L2Penalty: strength: <lambda> has no import path"):
        result.to_yaml(tmp_path / "reg.yaml")


def test_the_table_and_the_figure_show_every_candidate():
    result = synthetic(lambda name, split: random.Random(f"{name}{split}").gauss(0, 1), ("plain", "a", "b"))
    columns = {str(column.header): list(column.cells) for column in result.table().columns}
    assert columns["Candidate"] == ["plain", "a", "b"]
    assert columns["Verdict"] == ["", *(found.verdict for found in result.differences.values())]
    axis = result.figure().axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_the_table_fits_80_columns(capsys):
    """With an undecided candidate, whose row is the widest, and without cutting a character."""
    result = synthetic(lambda name, split: random.Random(f"{name}{split}").gauss(3, 0.07), ("plain", "weight clipping"))
    result.differences["weight clipping"] = Difference(-0.001, -0.008, 0.012, 0.397, "undecided", 124)
    rich.console.Console(width=80).print(result.table())
    printed = capsys.readouterr().out
    assert "weight clipping " in printed  # in one piece
    assert "-0.001 [-0.008, 0.012] 0.397 undecided    124 0.0" in printed
    assert "Overlap" in printed
    assert max(map(len, printed.splitlines())) <= 80


PLAIN = {"plain": [], "l2": [L2Penalty(1e-3)]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "val/los"}, ValueError, r"did not log the metric 'val/los'; it logged: val/loss"),
        ({"repeats": 2}, ValueError, "repeats must be an integer ≥ 3, got 2"),
        ({"mode": "maximum"}, ValueError, "mode must be 'min' or 'max', got 'maximum'"),
        ({"overlap": -1.0}, ValueError, "overlap must be finite and at least 0, got -1.0"),
        ({"rope": math.nan}, ValueError, "rope must be finite and at least 0, got nan"),
        ({"candidates": {"plain": []}}, ValueError, "at least two entries"),
        ({"candidates": [L2Penalty(1e-3)]}, TypeError, "candidates must be a mapping"),
        (
            {"candidates": {"plain": [], "l2": [L2Penalty]}},
            TypeError,
            "candidate 'l2': expected callbacks, got the class L2Penalty",
        ),
        ({"data": lambda split: loaders(0)}, ValueError, r"data\(0\) and data\(1\) have the same validation data"),
        ({"data": lambda split: loaders(split)[0]}, ValueError, "data must return a LightningDataModule, or a training loader"),
        ({"data": loaders(0)}, TypeError, "data must be a function of the split"),
        ({"model": Linear()}, TypeError, "model must be a function that returns a new model"),
        ({"trainer": Trainer(logger=False, barebones=True)}, TypeError, "trainer must be a mapping of Trainer arguments"),
        ({"storage": 3}, TypeError, "storage must be a database URL"),
        ({"storage": "runs/compare.db"}, ValueError, "storage must be a database URL"),
        ({"storage": "sqlite:////proc/none/x.db"}, ValueError, "cannot be reached"),
        ({"run": lambda callbacks, split, seed: 0.0}, TypeError, "run= replaces model, data, and trainer"),
        ({"model": None, "data": None, "trainer": None, "run": lambda *_: 0.0}, ValueError, "run= needs overlap="),
    ],
    ids=range(18),
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        real(**{"candidates": PLAIN, **options})


def test_early_stopping_can_be_a_candidate():
    result = real(
        {"plain": [], "stopping": [EarlyStopping("val/loss", min_delta=10, patience=1)]}, trainer={**TRAINER, "max_epochs": 5}
    )
    assert result.differences["stopping"].mean < 0
