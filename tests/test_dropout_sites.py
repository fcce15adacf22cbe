"""Where modules store dropout rates, which callback sets them, and schedules from the literature."""

from __future__ import annotations

import copy
import math
from abc import ABC

import pytest
import torch
from helpers import QUIET, Classifier, DropPath, Memory, fit, loader, same
from lightning.pytorch import Trainer
from torch import nn

import lightning_reg
from lightning_reg import Cosine, DropoutInjection, DropoutScheduler, Linear, Steps
from lightning_reg._engine.clock import Clock
from lightning_reg._engine.plan import Plan
from lightning_reg.functional import find_dropout, set_dropout_


class Attention(nn.Module):
    """Attention with its rate in a float attribute, as in many models."""

    def __init__(self, attention_dropout=0.0):
        super().__init__()
        self.attention_dropout = attention_dropout

    def forward(self, x):
        p = self.attention_dropout if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)


class AllSites(Classifier):
    """A model with every kind of dropout site. It records the rates in each forward pass."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.1, batch_first=True)
        self.path = DropPath(0.2)
        self.own = Attention(0.3)
        self.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)
        self.single = nn.GRU(8, 8, batch_first=True)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(self.rates())
        x = self.single(self.rnn(self.own(self.path(self.encoder(batch[0].view(-1, 8, 8)))))[0])[0]
        return super().training_step((x.flatten(1), batch[1]), batch_idx)

    def rates(self):
        encoder = self.encoder
        return {
            "net.3": self.net[3].p,
            "encoder.self_attn": encoder.self_attn.dropout,
            "encoder.dropout": encoder.dropout.p,
            "path": self.path.drop_prob,
            "own": self.own.attention_dropout,
            "rnn": self.rnn.dropout,
            "single": self.single.dropout,
        }


OWN_RATES = {"net.3": 0.1, "encoder.self_attn": 0.1, "encoder.dropout": 0.1, "path": 0.2, "own": 0.3, "rnn": 0.4, "single": 0.0}
ignore_inert = pytest.mark.filterwarnings("ignore:.*has a single layer")


@ignore_inert
def test_scheduler_sets_and_restores_every_site():
    model = AllSites()
    assert model.rates() == OWN_RATES
    fit([DropoutScheduler(0.5, attributes={"Attention": "attention_dropout"})], model, max_epochs=1)
    assert model.seen == [{**dict.fromkeys(OWN_RATES, 0.5), "single": 0.0}] * 4
    assert model.rates() == OWN_RATES


@ignore_inert
@pytest.mark.parametrize("part", ["MultiheadAttention", "DropPath", "LSTM", "Attention"])
def test_scheduled_site_drops(part):
    """At rate 1, the output of the part is 0 or does not depend on its input."""
    model = AllSites()
    scheduler = DropoutScheduler(1.0, modules=part, attributes={"Attention": "attention_dropout"})
    (site,) = scheduler.assign(model, [])["p"]
    before = site.original
    set_dropout_([site], 1.0)
    x, y = torch.randn(2, 3, 5, 8)
    if part == "MultiheadAttention":
        outputs = [site.module(z, z, z)[0] for z in (x, y)]
    elif part == "LSTM":
        site.module.flatten_parameters()
        outputs = [site.module(z)[1][0][1] for z in (x, y)]
    else:
        outputs = [site.module(z) for z in (x, y)] if part == "Attention" else []
        if part == "DropPath":
            set_dropout_([site], 0.999999)
            outputs = [site.module(z) for z in (x, y)]
    assert torch.equal(*outputs)
    set_dropout_([site], before)


def test_rate_without_effect_warns():
    with pytest.warns(UserWarning, match=r"DropoutScheduler: single has a single layer, .* use DropoutInjection"):
        fit([DropoutScheduler(0.5, attributes={"Attention": "attention_dropout"})], AllSites(), max_epochs=1)
    model = Classifier()
    model.net[3] = nn.Identity()
    model.rnn = nn.GRU(2, 2)
    with pytest.raises(ValueError, match=r"no dropout to schedule \(rnn has a single layer, .*\); to add some, use DropoutInj"):
        fit([DropoutScheduler(0.5)], model)


def test_dropout_attributes_can_be_extended(monkeypatch):
    model = nn.Sequential(Attention(0.3))
    assert find_dropout(model) == []
    monkeypatch.setitem(lightning_reg.DROPOUT_ATTRIBUTES, Attention, "attention_dropout")
    assert [(site.name, site.original) for site in find_dropout(model)] == [("0", 0.3)]
    with pytest.raises(
        TypeError, match=r"0.missing \(Attention\) must be a number .*, but the module has no attribute 'missing'"
    ):
        find_dropout(model, {"Attention": "missing"})
    with pytest.raises(ValueError, match="DropoutScheduler: attributes: the model has no module of class Atention"):
        fit([DropoutScheduler(0.1, attributes={"Atention": "p"})])


@ignore_inert
def test_depth_profile_sets_rate_of_each_part():
    model = AllSites()
    fit([DropoutScheduler({"encoder.*": Linear(0.0, 0.4), "LSTM": 0.25}, name="depth")], model, max_epochs=1)
    assert [seen["encoder.self_attn"] for seen in model.seen] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [seen["encoder.dropout"] for seen in model.seen] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [(seen["rnn"], seen["net.3"], seen["path"]) for seen in model.seen] == [(0.25, 0.1, 0.2)] * 4
    assert model.rates() == OWN_RATES


def test_scheduler_selects_injected_dropout():
    class RecordsRates(Classifier):
        def training_step(self, batch, batch_idx):
            (hook,) = self.net[2]._forward_hooks.values()
            self.seen = [*getattr(self, "seen", []), (hook.act.__self__.rate.p, self.net[3].p)]
            return super().training_step(batch, batch_idx)

    def rates(*schedulers, p=0.2):
        return fit([DropoutInjection(p, after="ReLU"), *schedulers], RecordsRates(), max_epochs=1).seen[-1]

    assert rates() == (0.2, 0.1)
    assert rates(DropoutScheduler(0.5)) == (0.5, 0.5)
    assert rates(DropoutScheduler(0.5, modules="DropoutInjection")) == (0.5, 0.1)
    assert rates(DropoutScheduler(0.5, modules="net.2")) == (0.5, 0.1)
    assert rates(DropoutScheduler(0.5, modules="Dropout")) == (0.2, 0.5)
    assert rates(DropoutScheduler({"net.2": 0.6, "net.3": 0.7})) == (0.6, 0.7)
    assert rates(DropoutScheduler(0.5, modules="Dropout"), p=Linear(0.0, 0.4)) == (pytest.approx(0.3), 0.5)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda: [DropoutScheduler(0.1), DropoutScheduler(0.2, modules="net.3")],
            "the dropout rate of net.3 is set by both DropoutScheduler and DropoutScheduler-net_3: use modules=",
        ),
        (
            lambda: [DropoutInjection(Linear(0.0, 0.1), after="ReLU"), DropoutScheduler(0.2)],
            "the dropout rate of net.2 is set by both DropoutScheduler and DropoutInjection-ReLU: .* or give DropoutInj",
        ),
        (
            lambda: [DropoutScheduler({"*": 0.1, "net.*": 0.2})],
            r"DropoutScheduler: the dropout rate of net.3 is set by both 'p/\*' and 'p/net.\*'",
        ),
        (
            lambda: [DropoutScheduler({"net.3": 0.1, "nett": 0.2})],
            "no module with dropout has a name or class that matches 'nett'; close matches: net.3",
        ),
        (lambda: [DropoutScheduler({})], "DropoutScheduler: p must have at least one pattern"),
        (lambda: [DropoutScheduler({"*": 1.2})], r"DropoutScheduler: p/\* must be a number in \[0, 1\], got 1.2"),
        (lambda: [DropoutScheduler({"*": Linear(0.0, 1.2)})], r"p/\*=Linear\(0.0, 1.2\) must be a number in \[0, 1\], got 1.2"),
        (lambda: [DropoutScheduler({"*": lambda t: 2.0})], r"DropoutScheduler: p/\*=.* at progress 0 must be a number"),
        (
            lambda: [DropoutInjection(0.1, after="ReLU", channelwise=True, samplewise=True)],
            "set only one of channelwise, samplewise, and shared_dims",
        ),
    ],
    ids=[
        "two schedulers",
        "injection and scheduler",
        "two globs",
        "glob without dropout",
        "no globs",
        "rate above 1",
        "schedule above 1",
        "callable above 1",
        "channels and samples",
    ],
)
def test_bad_arguments_raise(callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(callbacks())


def test_conflicting_rates_raise_before_training():
    class NeverStarts(Classifier):
        def on_fit_start(self):
            raise AssertionError("the fit has started")

    with pytest.raises(ValueError, match="is set by both"):
        fit([DropoutScheduler(0.1), DropoutScheduler(0.2, modules="net.3")], NeverStarts())


def test_profile_in_endless_run_raises():
    with pytest.raises(
        ValueError, match=r"p/net.\*=Linear\(0.0, 0.5\) depends on the fraction of training, but the run has no end"
    ):
        fit([DropoutScheduler({"net.*": Linear(0.0, 0.5)})], max_epochs=-1)


def test_summary_lists_sites_and_metrics_show_progress(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    logger = Memory()
    callbacks = [DropoutScheduler({"net.3": Linear(0.0, 0.4)}), DropoutInjection(Linear(0.1, 0.5), after=["ReLU", "net.0"])]
    fit(callbacks, logger=logger, log_every_n_steps=1, max_epochs=1, enable_model_summary=True)
    printed = capsys.readouterr().out
    assert "Dropout 0.1: net.3" in printed
    assert "p={'net.3': Linear(0.0, 0.4)}" in printed
    assert "after net.0, net.2" in printed
    assert [steps["reg/DropoutScheduler/p/net.3"] for steps in logger.steps.values()] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    for name in ("DropoutScheduler", "DropoutInjection-ReLU-net_0"):
        assert [steps[f"reg/{name}/progress"] for steps in logger.steps.values()] == [0.0, 0.25, 0.5, 0.75]
    assert {steps["reg/DropoutScheduler/sites"] for steps in logger.steps.values()} == {1}
    injected = [steps["reg/DropoutInjection-ReLU-net_0/p"] for steps in logger.steps.values()]
    assert injected == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_injection_drops_rnn_output_but_not_states():
    class Recurrent(Classifier):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 64, batch_first=True)

        def training_step(self, batch, batch_idx):
            output, (hidden, _) = self.rnn(batch[0].view(-1, 8, 8))
            self.fraction, self.states = (output == 0).float().mean().item(), (hidden == 0).sum().item()
            return super().training_step((output[:, -1], batch[1]), batch_idx)

    model = fit([DropoutInjection(0.5, after="LSTM")], Recurrent(), max_epochs=1)
    assert 0.45 < model.fraction < 0.55
    assert model.states == 0


# Published for 300 epochs (Z. Liu et al., 2023, and its repository): early dropout of ViT-T, linear from 0.1 to 0
# within 50 epochs; its early stochastic depth, likewise from 0.5; late stochastic depth of ViT-B, 0.4 from epoch 50 on.
EARLY = {0: 0.1, 1: 0.098, 10: 0.08, 25: 0.05, 40: 0.02, 49: 0.002, 50: 0.0, 51: 0.0, 150: 0.0, 299: 0.0}
EARLY_DEPTH = {0: 0.5, 1: 0.49, 10: 0.4, 25: 0.25, 40: 0.1, 49: 0.01, 50: 0.0, 299: 0.0}
EARLY_CONSTANT = {0: 0.1, 25: 0.1, 49: 0.1, 50: 0.0, 51: 0.0, 299: 0.0}
LATE = {0: 0.0, 25: 0.0, 49: 0.0, 50: 0.4, 51: 0.4, 299: 0.4}
DECAY = {0: 0.5, 75: 0.375, 150: 0.25, 225: 0.125, 297: 0.005}
CURRICULUM = {0: 0.0, 30: 0.316060, 60: 0.432332, 150: 0.496631, 299: 0.499976}  # 0.5 (1 - exp(-10 t))
RECIPES = [
    ('Linear(0.1, 0.0, until="50ep")', EARLY),
    ('Linear(0.5, 0.0, until="50ep")', EARLY_DEPTH),
    ('Steps([0.1, 0.0], at=["50ep"])', EARLY_CONSTANT),
    ('Steps([0.0, 0.4], at=["50ep"])', LATE),
    ("Linear(0.5, 0.0)", DECAY),
    ("lambda t: 0.5 * (1 - math.exp(-10 * t))", CURRICULUM),
]


@pytest.mark.parametrize(("recipe", "published"), RECIPES)
def test_docstring_recipes_match_published_schedules(recipe, published):
    assert f"``{recipe}``" in DropoutScheduler.__doc__
    clock = Clock(Plan(max_epochs=300, per_epoch=7))
    schedule = eval(recipe, {"Linear": Linear, "Steps": Steps, "math": math})
    scheduler = DropoutScheduler(schedule)
    scheduler.resolve(clock)
    scheduled = {}
    for epoch in published:
        scheduler.update(clock.moment_at(f"{epoch}ep"))
        scheduled[epoch] = scheduler.current["p"]
    assert scheduled == pytest.approx(published, abs=1e-6)
    early = Steps([0.1, 0.0], at=["49ep"])
    shifted = {epoch: early.at_moment(clock.moment_at(f"{epoch}ep")) for epoch in EARLY_CONSTANT}
    assert shifted != pytest.approx(EARLY_CONSTANT)  # detects a shift by one epoch


def test_early_and_late_dropout_in_fit():
    def rates_in_fit(schedule):
        seen = []
        model = Classifier()
        model.net[3].register_forward_hook(lambda module, args, output: seen.append(module.p))
        fit([DropoutScheduler(schedule)], model, loader(), max_epochs=6)
        return seen

    assert rates_in_fit(Steps([0.1, 0.0], at=["1ep"])) == [0.1] * 4 + [0.0] * 20
    assert rates_in_fit(Steps([0.0, 0.4], at=["1ep"])) == [0.0] * 4 + [0.4] * 20
    assert rates_in_fit(Linear(0.1, 0.0, until="1ep")) == pytest.approx([0.1, 0.075, 0.05, 0.025] + [0.0] * 20)


def test_repr_of_profile_round_trips():
    scheduler = DropoutScheduler({"a.*": Cosine(0.1, 0.2), "b": 0.3}, attributes={"Attention": "drop"}, modules=["a.*", "b"])
    assert repr(eval(repr(scheduler), vars(lightning_reg))) == repr(scheduler)


def test_modules_built_in_configure_model_are_found():
    class Later(Classifier):
        def configure_model(self):
            if isinstance(self.net[3], nn.Identity):
                self.net[3] = nn.Dropout(0.2)

    model = Later()
    model.net[3] = nn.Identity()
    Trainer(**QUIET, max_epochs=1, callbacks=[DropoutScheduler(0.5)]).fit(model, loader())
    assert model.net[3].p == 0.2


def test_registry_of_subclasses_is_not_triggered():
    class Registered(nn.Dropout):
        register = {}

        def __init_subclass__(cls):
            assert cls.__name__ not in Registered.register, "already registered"
            Registered.register[cls.__name__] = cls

    class Act(Registered):
        pass

    model = Classifier()
    model.net[3] = Act(0.1)
    fit([DropoutScheduler(Linear(0.0, 0.5))], model, max_epochs=1)
    assert Registered.register == {"Act": Act}
    assert type(model.net[3]) is Act


@pytest.mark.parametrize(
    "callback", [DropoutScheduler(0.5), DropoutInjection(0.5, after="Cell")], ids=["scheduler", "injection"]
)
def test_class_with_another_base_before_module(callback):
    """Such a class has another object layout, as the recurrent cells of pytorch-forecasting do."""

    class Cell(ABC, nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    def with_cell():
        model = Classifier()
        model.net[1] = Cell(16, 16, num_layers=2, dropout=0.1)
        return model

    plain, dropped = fit([], with_cell(), max_epochs=1), fit([callback], with_cell(), max_epochs=1)
    assert not same(dropped, plain)
    assert type(dropped.net[1]) is Cell
    assert dropped.net[1].dropout == 0.1


def test_custom_reduce_is_used_during_fit():
    class Own(nn.Dropout):
        def __reduce__(self):
            return Own, (0.25,)

    class Copies(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.copied = copy.deepcopy(self.net[3])

    model = Copies()
    model.net[3] = Own(0.1)
    fit([DropoutScheduler(Linear(0.0, 0.5))], model, max_epochs=1)
    assert model.copied.p == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropoutScheduler(Linear), r"p must be a number or a schedule, got the class Linear: .*, as in Linear\(…\)"),
        (
            lambda: DropoutScheduler({nn.Dropout: 0.1}),
            "the keys of p must name modules, got the class Dropout: write .*'Dropout'",
        ),
        (
            lambda: DropoutScheduler(0.1, attributes=nn.Dropout),
            "attributes must be a dictionary, as in .*, got the class Dropout",
        ),
        (
            lambda: DropoutScheduler(0.1, attributes={nn.ReLU(): "p"}),
            "each key of attributes must be a class of modules or its name",
        ),
        (
            lambda: DropoutScheduler(0.1, attributes={"Attention": 0.1}),
            "Attention must have the name of an attribute or a list",
        ),
        (lambda: DropoutScheduler(0.1, name=nn.Dropout), "name must be a string, got the class Dropout"),
    ],
    ids=["class of schedules", "class in p", "class in attributes", "module in attributes", "rate in attributes", "name"],
)
def test_argument_of_a_wrong_type_raises_in_the_constructor(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_attribute_that_is_a_tensor_is_described_in_one_line():
    with pytest.raises(TypeError, match=r"weight \(Linear\) must be a number in \[0, 1\], got a tensor of shape \(3, 2\)"):
        find_dropout(nn.Sequential(nn.Linear(2, 3)), {nn.Linear: "weight"})
