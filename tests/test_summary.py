"""The summary of a fit: complete, and readable on a narrow console."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import QUIET, Classifier, Unfreezes, fit, loader, set_width, words
from lightning.pytorch import Callback, Trainer
from torch import nn

import lightning_reg
from lightning_reg import (
    ActivityPenalty,
    Cubic,
    DropoutInjection,
    DropoutScheduler,
    GradientNormClipping,
    L1Penalty,
    L2Penalty,
    Linear,
    WeightDecay,
    WeightPruning,
)


@pytest.fixture
def printed(capsys, monkeypatch):
    """Return a function that trains, and returns what is printed about regularization."""

    def run(callbacks, model=None, columns=250, **trainer):
        set_width(monkeypatch, columns)
        fit(callbacks, model, **{"max_epochs": 1, "enable_model_summary": True, **trainer})
        text = capsys.readouterr().out
        return text.split("Regularization", 1)[1].split("┃   ┃ Name", 1)[0].rsplit("\n┏━━━┳", 1)[0]

    return run


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_it_says_what_weights_leaves_out_once(printed):
    text = printed([L2Penalty(0.1), WeightDecay(0.1), GradientNormClipping(1.0)])
    assert re.findall("'weights' leaves out.*", text) == [
        "'weights' leaves out biases (net.0.bias, net.1.bias, net.4.bias), normalization (net.1.weight)"
    ]
    assert "leaves out" not in printed([GradientNormClipping(1.0), L2Penalty(0.1, params="net.0.*")])


class HeadOnly(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[4].parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*has no effect for now")
def test_it_counts_only_what_an_optimizer_holds(printed):
    rows = cells(printed([GradientNormClipping(1.0), L2Penalty(0.1, params="net.0.*")], HeadOnly()))
    assert rows[0][1] == "0 tensors, 0 parameters"
    assert rows[1][1] == "2 tensors, 170 parameters: net.4.weight, net.4.bias"


def test_it_names_tensors_where_they_are_few(printed):
    assert cells(printed([GradientNormClipping(1.0)]))[0][1] == "6 tensors, 1,242 parameters"
    assert cells(printed([GradientNormClipping(1.0, params="net.0.bias")]))[0][1] == "1 tensor, 16 parameters: net.0.bias"
    assert cells(printed([ActivityPenalty(0.1, modules="ReLU")]))[0][1] == "1 module: net.2"


def test_it_shows_every_setting_that_is_not_the_default(printed):
    pruning = WeightPruning(0.5, structure="unit", scope="layer", params=["weights", "!net.4.*"], name="mine")
    assert cells(printed([pruning]))[0] == [
        "mine",
        "1 tensor, 1,024 parameters: net.0.weight",
        "sparsity=0.5, scope='layer', structure='unit', params=['weights', '!net.4.*']",
        "after the step and the epoch",
    ]
    assert cells(printed([L1Penalty(0.1)]))[0][2] == "strength=0.1"
    many = L1Penalty(0.1, params=["weights", *(f"!net.{index}*" for index in (1, 4, 4, 4, 4))])
    assert cells(printed([many]))[0][2] == "strength=0.1, params=['weights', '!net.1*', '!net.4*', '!net.4*' and 2 more]"
    assert cells(printed([L1Penalty(0.1, inject="gradient")]))[0][2:] == ["strength=0.1, inject='gradient'", "gradient"]


class Deep(Classifier):
    """A model with the long names of Hugging Face's BERT."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        layers = [
            nn.ModuleDict(
                {"attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(8, 8), "dropout": nn.Dropout()})})}
            )
            for _ in range(12)
        ]
        self.bert = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)})})


def everything():
    return [
        DropoutScheduler(Linear(0.0, 0.2)),
        DropoutInjection(0.1, after=["bert.*.dense", "ReLU"], name="after dense"),
        L2Penalty(Linear(0.0, 0.1, until="1ep")),
        GradientNormClipping(1.0, params="bert.encoder.layer.0.*"),
        WeightPruning(Cubic(0.0, 0.9, until=0.7), structure="unit", scope="layer", params=["weights", "!net.4.*"]),
    ]


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120])
def test_no_word_is_broken_and_no_line_too_long(printed, columns):
    narrow, wide = printed(everything(), Deep(), columns), printed(everything(), Deep(), 1000)
    labels = {"acts", "on", "setting", "where", "Acts", "Setting", "Where", "Callback"}
    assert sorted(word for word in words(narrow) if word not in labels) == sorted(w for w in words(wide) if w not in labels)
    longest = max(map(len, words(wide)))
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= max(columns, longest)
    assert len(narrow.splitlines()) < 60


def test_where_the_console_is_wide_enough_it_is_a_table(printed):
    few = [L2Penalty(0.1), GradientNormClipping(1.0)]
    assert "│ L2Penalty" in printed(few, columns=80)
    assert "│" not in printed(everything(), Deep(), 80)


# At any time --------------------------------------------------------------------------------------------------------


class Asks(Callback):
    """Prints the summary in each epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        lightning_reg.summary(trainer)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_it_is_printed_on_request(capsys, monkeypatch):
    set_width(monkeypatch, 200)
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[GradientNormClipping(1.0), L2Penalty(0.1), Unfreezes(), Asks()])
    lightning_reg.summary(trainer)
    before = cells(capsys.readouterr().out)
    assert before == [
        ["L2Penalty", "not known yet", "strength=0.1", "loss or gradient"],
        ["GradientNormClipping", "not known yet", "max_norm=1.0", "before the step"],
    ]
    trainer.fit(Classifier(), loader())
    first, second = capsys.readouterr().out.split("Regularization")[1:]
    assert cells(first)[0] == ["L2Penalty", "1 tensor, 160 parameters: net.4.weight", "strength=0.1", "loss"]
    assert cells(second)[0][1] == "2 tensors, 1,184 parameters: net.0.weight, net.4.weight"
    lightning_reg.summary(trainer)
    assert cells(capsys.readouterr().out) == cells(first)


def test_it_is_that_of_the_trainer_where_trainers_share_a_callback(capsys, monkeypatch):
    set_width(monkeypatch, 200)
    shared = GradientNormClipping(1.0)
    first, second = (Trainer(**QUIET, max_epochs=1, callbacks=callbacks) for callbacks in ([shared], [shared, L2Penalty(0.1)]))
    first.fit(Classifier(), loader())
    second.fit(HeadOnly(), loader())
    capsys.readouterr()
    lightning_reg.summary(first)
    assert [row[:2] for row in cells(capsys.readouterr().out)] == [["GradientNormClipping", "6 tensors, 1,242 parameters"]]
    lightning_reg.summary(second)
    assert cells(capsys.readouterr().out)[0][:2] == ["L2Penalty", "1 tensor, 160 parameters: net.4.weight"]


def test_a_trainer_without_regularization_is_said():
    with pytest.raises(ValueError, match="the trainer has no callback of lightning_reg"):
        lightning_reg.summary(Trainer(**QUIET))
