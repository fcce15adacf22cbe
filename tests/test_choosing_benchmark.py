"""The benchmark of ``choose``, shortened: what it keeps apart, and what its placebos change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from digits import Digits, DigitsClassifier
from sklearn.metrics import r2_score

from lightning_reg import DropoutInjection
from lightning_reg.tuning.experiment import TrainerRun
from tests.benchmarks.choosing import RandomNumbers, choose_on, data_table, mean_score, placebo_lines, placebo_studies
from tests.benchmarks.datasets import DATASETS, Outer

TRAINER = {"max_epochs": 2, "accelerator": "cpu"}


@pytest.mark.parametrize("name", DATASETS)
def test_choosing_never_sees_test_samples(name):
    """Every sample is in one part of each split, and numbers give different splits."""
    if name in ("MNIST", "Japanese vowels"):
        pytest.importorskip("aeon", reason="needs Python 3.11")
    outer, other = Outer(DATASETS[name], 0), Outer(DATASETS[name], 1)
    assert sorted([*outer.development, *outer.test]) == list(range(len(outer.x)))
    assert set(outer.test) != set(other.test)
    marked = torch.arange(len(outer.x), dtype=torch.float32)[:, None]
    outer.x = marked  # each sample is its number; loaders standardize by the training part
    train, val = (loader.dataset.tensors[0].squeeze(1) for loader in outer.data(3))
    std, mean = torch.std_mean(marked[sorted(numbers(outer, 3)[0])])
    seen = {round(value) for value in (torch.cat([train, val]) * std + mean).tolist()}
    assert seen == set(outer.development.tolist())
    assert len(train) == pytest.approx(4 * len(val), abs=4)


def numbers(outer, split):
    """Return the samples of a split to train on, and those to validate on."""
    return outer._split(outer.development, len(outer.development) * 4 // 5, split)


def test_loaders_standardize_by_the_training_part():
    outer = Outer(DATASETS["diabetes"], 0)
    train, val = outer.data(0)
    x, y = train.dataset[:]
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(), torch.tensor(1.0))
    assert abs(val.dataset.tensors[1].mean()) > 1e-3


def test_score_of_a_regression_is_r2():
    outer = Outer(DATASETS["diabetes"], 0)
    model, (batch,) = outer.model(), outer.loaders(outer.development, outer.test)[1]
    with torch.no_grad():
        assert model.score(batch).item() == pytest.approx(r2_score(batch[1], model(batch[0])), abs=1e-5)


def test_chosen_callbacks_are_tested_against_plain():
    outer = Outer(DATASETS["wine"], 0)
    plain, again, dropped = (
        mean_score(outer, callbacks, TRAINER) for callbacks in ([], [], [DropoutInjection(0.9, after="ReLU")])
    )
    assert plain == again
    assert dropped.loss > plain.loss
    assert 0 <= plain.score <= 1


@pytest.mark.slow
def test_table_has_a_row_for_each_split():
    found = choose_on("iris", 0, trials=3, confirm=3, epochs=2)
    (row,) = zip(*(column.cells for column in data_table([found]).columns), strict=True)
    assert row[0] == "iris"
    assert row[-1] in ("plain kept", "win", "loss")
    assert math.isfinite(found.plain.loss)
    assert bool(found.choice.callbacks) == (found.chosen != found.plain)


@pytest.mark.slow
def test_placebos_change_the_run_and_nothing_else():
    run = TrainerRun(DigitsClassifier, lambda split: Digits(seed=split), "val/loss", TRAINER)
    values = [float(run([RandomNumbers(number)] if number else [], 0, 0)) for number in (0, 1, 7, 7)]
    assert len(set(values)) == 3
    assert values[2] == values[3]
    assert np.std(values) < 0.1 * np.mean(values)
    choices = list(placebo_studies(studies=2, trials=3, confirm=3, epochs=1))
    assert "of 2 studies with placebos choose nothing" in placebo_lines(choices)
    first, second = ([trial.value for trial in choice.trials] for choice in choices)
    assert len({*first, *second}) > 2
    assert first != second
