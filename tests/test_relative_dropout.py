"""Several rates in one class of modules, and scheduled factors of the rates that modules have."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, DropPath, fit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_reg
from lightning_reg import DropoutInjection, DropoutScheduler, Linear, MonteCarloDropout
from lightning_reg.functional import find_dropout

PROFILE = [0.0, 0.5 / 3, 1.0 / 3, 0.5]


class Layer(nn.Module):
    """A layer with two rates of its own, as BART's has them."""

    def __init__(self, dropout=0.1, activation_dropout=0.2):
        super().__init__()
        self.dropout, self.activation_dropout = dropout, activation_dropout

    def forward(self, x):
        x = nn.functional.dropout(x.relu(), p=self.activation_dropout, training=self.training)
        return nn.functional.dropout(x, p=self.dropout, training=self.training)


class Deep(Classifier):
    """Four blocks whose stochastic depth rises with depth, and a layer with two rates."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(DropPath(p) for p in PROFILE)
        self.layer = Layer()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(([block.drop_prob for block in self.blocks], (self.layer.dropout, self.layer.activation_dropout)))
        x = batch[0]
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return super().training_step((self.layer(x), batch[1]), batch_idx)


BOTH = {"Layer": ["dropout", "activation_dropout"]}


def test_several_attributes_of_one_class_are_found_and_driven():
    sites = find_dropout(Layer(), BOTH)
    assert [(site.attribute, site.original) for site in sites] == [("dropout", 0.1), ("activation_dropout", 0.2)]
    assert [site.label for site in find_dropout(Deep(), BOTH)][-2:] == ["layer.dropout", "layer.activation_dropout"]
    model = fit([DropoutScheduler(0.4, modules="layer", attributes=BOTH)], Deep(), max_epochs=1)
    assert {rates for _, rates in model.seen} == {(0.4, 0.4)}
    assert (model.layer.dropout, model.layer.activation_dropout) == (0.1, 0.2)


def test_several_attributes_in_the_registry(monkeypatch):
    monkeypatch.setitem(lightning_reg.DROPOUT_ATTRIBUTES, Layer, ["dropout", "activation_dropout"])
    model = fit([DropoutScheduler({"Layer": 0.4})], Deep(), max_epochs=1)
    assert {rates for _, rates in model.seen} == {(0.4, 0.4)}
    assert type(model.layer) is Layer


@pytest.mark.parametrize("callback", [lambda attributes: DropoutScheduler(0.1, attributes=attributes)])
@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"Layr": "dropout"}, ValueError, "the model has no module of class Layr; close matches: Layer"),
        ({nn.Tanh: "p"}, ValueError, "the model has no module of class Tanh; close matches: "),
        ({"Layer": ["dropout", "drop"]}, TypeError, r"layer.drop \(Layer\) must be a number .* has no attribute 'drop'"),
        ({"Layer": "forward"}, TypeError, r"layer.forward \(Layer\) must be a number in \[0, 1\], got .* of type method"),
        ({"Layer": 0.1}, TypeError, "attributes: Layer must have the name of an attribute or a list of names, got 0.1"),
        ({"Layer": []}, TypeError, r"attributes: Layer must have the name of an attribute or a list of names, got \[\]"),
    ],
)
def test_entries_that_name_nothing_are_refused(callback, attributes, error, message):
    with pytest.raises(error, match=f"DropoutScheduler: .*{message}|DropoutScheduler: {message}"):
        fit([callback(attributes)], Deep())


def test_monte_carlo_dropout_names_itself_in_such_errors():
    with pytest.raises(ValueError, match="MonteCarloDropout: attributes: the model has no module of class Layr"):
        MonteCarloDropout(2, attributes={"Layr": "dropout"})._own_sites(Deep())


@pytest.mark.parametrize("make", [lambda: DropoutScheduler(0.1), lambda: DropoutScheduler(0.1, relative=True)])
def test_a_model_without_dropout_is_told_of_attributes(make):
    model = Classifier()
    model.net[3] = nn.Identity()
    with pytest.raises(ValueError, match=r"use DropoutInjection; if a module keeps its rate in an attribute, .* attributes="):
        fit([make()], model)


def test_a_factor_keeps_the_profile_over_depth():
    model = fit([DropoutScheduler(Linear(0.0, 2.0), modules="DropPath", relative=True)], Deep(), max_epochs=1)
    for batch, (rates, own) in enumerate(model.seen):
        assert rates == pytest.approx([2 * batch / 4 * p for p in PROFILE])
        assert own == (0.1, 0.2)
    assert [block.drop_prob for block in model.blocks] == PROFILE
    absolute = fit([DropoutScheduler(0.5, modules="DropPath")], Deep(), max_epochs=1)
    assert absolute.seen[0][0] == [0.5] * 4


def test_a_factor_of_one_changes_nothing():
    torch.manual_seed(0)
    one = fit([DropoutScheduler(1.0, relative=True, attributes=BOTH)], Deep(), max_epochs=1)
    other = fit([], Deep(), max_epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_factors_of_injected_dropout_and_by_pattern():
    class Watches(Classifier):
        def training_step(self, batch, batch_idx):
            (hook,) = self.net[2]._forward_hooks.values()
            self.seen = hook.act.__self__.rate.p, self.net[3].p
            return super().training_step(batch, batch_idx)

    callbacks = [DropoutInjection(0.2, after="ReLU"), DropoutScheduler({"net.2": 3.0, "net.3": 0.5}, relative=True)]
    assert fit(callbacks, Watches(), max_epochs=1).seen == pytest.approx((0.6, 0.05))


def test_compiled_code_reads_each_product_and_needs_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.5)), backend=counter)
            self.shares = []

        def training_step(self, batch, batch_idx):
            self.shares.append((self.body(torch.ones(100, 64)) == 0).float().mean().item())
            return super().training_step(batch, batch_idx)

    model = fit([DropoutScheduler(Linear(0.0, 2.0), modules="body.*", relative=True)], Compiled(), max_epochs=1)
    assert counter.frame_count == 1
    for batch, fraction in enumerate(model.shares):
        expected = 1 - (1 - 0.1 * batch / 2) * (1 - 0.5 * batch / 2)
        assert abs(fraction - expected) < 5 * (expected * (1 - expected) / 6400) ** 0.5 + 1e-9
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (2.5, r"p=2.5 times the rate of blocks.3 \(DropPath\), 0.5, is 1.25, which is above 1"),
        (Linear(0.0, 2.5), r"p=Linear\(0.0, 2.5\) times the rate of blocks.3 \(DropPath\), 0.5, is 1.25, which is above 1"),
        ({"blocks.3": 2.5}, r"p/blocks.3=2.5 times the rate of blocks.3"),
    ],
)
def test_a_product_above_one_is_refused_before_the_fit(p, message):
    class Never(Deep):
        def on_fit_start(self):
            raise AssertionError("the fit has started")

    with pytest.raises(ValueError, match=message):
        fit([DropoutScheduler(p, relative=True)], Never())


def test_a_product_above_one_of_a_function_is_refused_when_it_is_reached():
    model = Deep()
    with pytest.raises(
        ValueError, match=r"DropoutScheduler-blocks_2: p=3.01 times the rate of blocks.2 \(DropPath\), 0.333333, is 1.00333"
    ):
        fit([DropoutScheduler(lambda t: 0.0 if t < 0.5 else 3.01, modules="blocks.2", relative=True)], model, max_epochs=1)
    assert [block.drop_prob for block in model.blocks] == PROFILE


def test_the_range_is_that_of_a_factor():
    with pytest.raises(ValueError, match=r"DropoutScheduler: p must be a number in \[0, inf\), got -0.1"):
        DropoutScheduler(-0.1, relative=True)
    with pytest.raises(ValueError, match=r"p must be a number in \[0, 1\], got 1.5"):
        DropoutScheduler(1.5)
    assert repr(DropoutScheduler(1.5, relative=True)) == "DropoutScheduler(1.5, relative=True)"


def test_factors_of_zero_are_warned_of():
    model = Classifier()
    model.net[3].p = 0.0
    with pytest.warns(
        UserWarning, match="DropoutScheduler: all original rates are 0, so multiplying them changes nothing: Dropout 0: net.3"
    ):
        fit([DropoutScheduler(2.0, relative=True)], model, max_epochs=1)


def test_the_summary_says_who_sets_the_rate_of_injected_dropout(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")

    def shown(*schedulers):
        fit([DropoutInjection(0.2, after=["ReLU", "net.0"]), *schedulers], max_epochs=1, enable_model_summary=True)
        (row,) = [line for line in capsys.readouterr().out.splitlines() if "│ DropoutInjection-" in line]
        assert row.split("│")[2].strip() == "after net.0, net.2"
        return row.split("│")[3].strip().removesuffix(", after=['ReLU', 'net.0']")

    assert shown() == "p=0.2"
    assert shown(DropoutScheduler(0.3)) == "p by DropoutScheduler"
    assert shown(DropoutScheduler(0.3, modules="net.3")) == "p=0.2"
    one = DropoutScheduler(0.3, modules="net.0", name="one")
    assert shown(one) == "p=0.2, p of net.0 by one"
    other = DropoutScheduler(0.3, modules="net.2", name="other")
    assert shown(one, other) == "p of net.0 by one, p of net.2 by other"
    assert shown() == "p=0.2"
