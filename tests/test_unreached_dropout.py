"""Dropout that is not there, or not registered: errors, warnings, and the summary say so and what to do."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, same
from torch import nn

from lightning_reg import DropoutInjection, DropoutScheduler, MonteCarloDropout
from lightning_reg.dropout.unreached import placeholders


class Lora(nn.Module):
    """A linear layer with a low-rank update, which keeps its dropout as peft does."""

    def __init__(self, dropout):
        super().__init__()
        self.base_layer = nn.Linear(16, 16)
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_a, self.lora_b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_b(self.lora_a(self.lora_dropout["default"](x)))


class DropBlock2d(nn.Module):
    """Drops blocks in training, like timm's class of this name. The code alone does not show which attribute is the rate."""

    def __init__(self, drop_prob=0.1, block_size=3):
        super().__init__()
        self.drop_prob, self.block_size = drop_prob, block_size

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.bernoulli(torch.full_like(x, 1 - self.drop_prob))
        return x * keep


def model(*layers, dropout=0.0):
    """Return the model with other layers in place of its dropout."""
    classifier = Classifier()
    classifier.net[3] = nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))
    return classifier


IDENTITY = (
    r"net.3.0.lora_dropout.default is nn.Identity instead of dropout of rate 0: create the model with a rate above 0, or add "
    r"dropout there, as in DropoutInjection\(0.1, after='\*lora_dropout\*'\)"
)


@pytest.mark.parametrize(
    ("callback", "others"),
    [
        (DropoutScheduler(0.1), 0.0),
        (DropoutScheduler(0.1, modules="*lora_dropout*"), 0.3),
        (DropoutScheduler(0.1, modules="*.default"), 0.3),
        (DropoutScheduler({"Dropout": 0.2, "*lora_dropout*": 0.1}), 0.3),
        (DropoutInjection(0.1, after="Dropout"), 0.0),
        (DropoutInjection(0.1, after=["Linear", "*drop2*"]), 0.3),
        (MonteCarloDropout(), 0.0),
    ],
    ids=lambda value: repr(value),
)
def test_errors_name_identity_in_place_of_dropout(callback, others):
    with pytest.raises(ValueError, match=rf"(no dropout|matches).*; {IDENTITY}"):
        fit([callback], model(Lora(0.0), dropout=others))


def test_other_errors_do_not_name_it():
    for callback in (DropoutScheduler(0.1, modules="encoder.*"), DropoutInjection(0.1, after="encoder.*")):
        with pytest.raises(ValueError, match="close matches") as caught:
            fit([callback], model(Lora(0.0), dropout=0.3))
        assert "Identity" not in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_summary_names_it(rate, capsys):
    fit([DropoutScheduler(0.1)], model(Lora(rate), dropout=0.3), enable_model_summary=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("net.3.0.lora_dropout.default is nn.Identity instead of dropout" in printed) is (rate == 0.0)


def test_what_the_error_says_to_do_works():
    """A rate above 0 is scheduled, and dropout is added in place of the identity."""
    plain = fit(model=model(Lora(0.2)))
    assert not same(fit([DropoutScheduler(0.9, modules="*lora_dropout*")], model(Lora(0.2))), plain)
    without = model(Lora(0.0))
    without.load_state_dict(model(Lora(0.2)).state_dict())
    assert not same(fit([DropoutInjection(0.9, after="*lora_dropout.default")], without), plain)


def test_identities_by_name():
    """Those for norms and downsampling are no dropout."""
    names = ["drop_path1", "attn_drop", "lora_dropout", "norm", "downsample", "raindrops.norm.x"]
    tree = nn.Module()
    for name in names:
        tree.add_module(name.replace(".", "_"), nn.Identity())
    assert placeholders(tree) == ["drop_path1", "attn_drop", "lora_dropout", "raindrops_norm_x"]
    assert placeholders(nn.ModuleDict({"raindrops": nn.ModuleDict({"norm": nn.ModuleDict({"x": nn.Identity()})})})) == []


SUGGESTED = r"attributes={'DropBlock2d': 'drop_prob'}"


def test_classes_named_for_dropout_are_suggested():
    with pytest.raises(ValueError, match=rf"no dropout to schedule; .* name both, as in {SUGGESTED}"):
        fit([DropoutScheduler(0.1)], model(DropBlock2d()))
    with pytest.raises(ValueError, match=rf"no dropout; .* name both, as in {SUGGESTED}"):
        fit([MonteCarloDropout()], model(DropBlock2d()))
    with pytest.raises(ValueError, match=rf"matches 'DropBlock2d'; .*; to schedule rates in attributes, set {SUGGESTED}"):
        fit([DropoutScheduler(0.1, modules="DropBlock2d")], model(DropBlock2d(), dropout=0.3))
    with pytest.warns(UserWarning, match=rf"keep dropout rates in attributes that are not scheduled; .* {SUGGESTED}"):
        fit([DropoutScheduler(0.1)], model(DropBlock2d(), dropout=0.3))


def test_suggested_attributes_work():
    seen = []

    class Recorded(DropBlock2d):
        def forward(self, x):
            seen.append(self.drop_prob)
            return super().forward(x)

    fit([DropoutScheduler(0.25, attributes={"Recorded": "drop_prob"})], model(Recorded()), max_epochs=1)
    assert seen == [0.25] * 4
    callback = DropoutScheduler(0.25, modules="DropBlock2d", attributes={"DropBlock2d": "drop_prob"})
    fit([callback], model(DropBlock2d(), dropout=0.3), max_epochs=1)


def test_classes_without_a_rate_are_not_suggested():
    class DropLast(nn.Module):
        """Drops the last entries of its input, and has no rate."""

        def __init__(self):
            super().__init__()
            self.p = 3.5

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"as in attributes={'Attention': 'attention_dropout'}$"):
        fit([DropoutScheduler(0.1)], model(DropLast()))
