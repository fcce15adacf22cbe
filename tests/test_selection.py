from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit
from torch import nn

from lightning_reg import L1Penalty, decay_groups, sparsity
from lightning_reg._engine.module_selection import select_modules
from lightning_reg._engine.names import canonical_name
from lightning_reg._engine.selection import select_parameters
from lightning_reg.functional import find_dropout


class Zoo(nn.Module):
    """A module with every kind of parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.bn = nn.BatchNorm2d(4)
        self.rnn = nn.GRU(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.prelu = nn.PReLU(4)
        self.rms = type("LlamaRMSNorm", (nn.Module,), {})()
        self.rms.weight = nn.Parameter(torch.ones(1, 4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.mix = nn.Parameter(torch.ones(2, 2))


WEIGHTS = [
    "mix",
    "embed.weight",
    "conv.weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


def test_weights_exclude_biases_norms_and_vectors():
    assert list(select_parameters(Zoo(), "weights")) == WEIGHTS


def test_all_includes_tied_parameter_once():
    zoo = Zoo()
    assert [id(p) for p in select_parameters(zoo, "all").values()] == [id(p) for p in zoo.parameters()]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("conv.*", ["conv.weight", "conv.bias"]),
        (["conv.*", "!*.bias"], ["conv.weight"]),
        (["weights", "!rnn.*", "!attention.*"], ["mix", "embed.weight", "conv.weight"]),
        (["!*.bias", "bn.*"], ["bn.weight"]),
        ("head.weight", ["embed.weight"]),
        (["weights", "!head.*"], [name for name in WEIGHTS if name != "embed.weight"]),
        (lambda name, p, module: isinstance(module, nn.PReLU), ["prelu.weight"]),
    ],
    ids=[
        "glob",
        "glob and exclusion",
        "weights and exclusions",
        "exclusion first",
        "tied weight",
        "excluded tied weight",
        "callable",
    ],
)
def test_globs_and_callables(params, names):
    assert list(select_parameters(Zoo(), params)) == names


def test_compiled_modules_keep_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0] = torch.compile(model[0])
    assert list(select_parameters(model, ["0.*"])) == ["0.weight", "0.bias"]
    assert canonical_name("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.weight") == "a.b.weight"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("encodr.*", r"no parameter has a name that matches 'encodr.\*'; close matches: encoder.bias, encoder.weight"),
        (
            ["weights", "!encodr.*"],
            r"no parameter has a name that matches '!encodr.\*'; close matches: encoder.bias, encoder.weight",
        ),
        (["!encoder.*"], r"start with what to include, as in \['weights', '!head.\*'\]"),
        ([], r"params=\[\] selects no parameter"),
        (
            lambda name, p, module: False,
            "params=<lambda> selects no parameter: it returned a false value for each of encoder.weight, encoder.bias",
        ),
        (["encoder.*", "!*"], r"params=\['encoder.\*', '!\*'\] selects no parameter"),
    ],
    ids=["unknown name", "unknown exclusion", "exclusion alone", "empty list", "callable", "everything excluded"],
)
def test_empty_selection_raises_with_close_matches(params, message):
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=message):
        select_parameters(model, params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "start with what to include"),
        ("!weights", r"params=\['!weights'\] selects no parameter: start with what to include"),
        ("", "params has '', which names no parameter: write 'weights' or a glob"),
        (["weights", "!"], "params has '', which names no parameter"),
        ("weights:", "params has 'weights:', which names no parameter: write 'weights', or a glob after the colon"),
        ("weights:!encoder.*", r"to exclude, write \['weights', '!encoder.\*'\]"),
    ],
    ids=["empty list", "exclusion alone", "empty name", "empty exclusion", "nothing after the colon", "! after the colon"],
)
def test_malformed_selection_raises_in_the_constructor(params, message):
    with pytest.raises(ValueError, match="L1Penalty: .*" + message):
        L1Penalty(0.1, params=params)
    with pytest.raises(ValueError, match="decay_groups: .*" + message):
        decay_groups(nn.Linear(2, 2), 0.1, params=params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("encoder", r"it is a module: write 'encoder.\*'"),
        ("weight:encoder.*", r"'weight' is not a keyword: write 'weights:encoder.\*'"),
        (":encoder.*", "'' is not a keyword: the keywords are 'weights', 'all'"),
        ("Weights", "close matches: weights, "),
        ("weights,biases", r"to name several, write a list: \['weights', 'biases'\]"),
        ("weights !head.*", r"to name several, write a list: \['weights', '!head.\*'\]"),
        ("weights: encoder.*", r"write 'weights:encoder.\*', without spaces"),
        ("Linear", r"it is a class of modules: write params=lambda name, parameter, module: isinstance\(module, Linear\)"),
        ("norms:encoder.*", "'norms' include none of encoder.weight, encoder.bias"),
    ],
    ids=["module", "keyword", "no keyword", "case", "comma", "space", "space after the colon", "class", "no norms"],
)
def test_unknown_name_raises_with_what_to_write(params, message):
    with pytest.raises(ValueError, match=message):
        select_parameters(nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)}), params)


def test_names_of_compiled_modules_can_be_written_as_torch_lists_them():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "0._orig_mod.0.weight"
    assert list(select_parameters(model, names[:2])) == ["0.0.weight", "0.0.bias"]
    assert list(select_parameters(model, ["weights:0._orig_mod.*"])) == ["0.0.weight"]
    assert list(select_modules(model, ["0._orig_mod.?", "!0._orig_mod.1"])) == ["0.0"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda name, p, module: p, r"must return True or False, but returned a tensor of shape \(2, 2\) for 'weight'"),
        (lambda name: True, "must be a function of three arguments"),
    ],
    ids=["tensor", "one argument"],
)
def test_function_that_cannot_select_raises(function, message):
    with pytest.raises(TypeError, match=message):
        select_parameters(nn.Linear(2, 2), function)
    assert list(select_parameters(nn.Linear(2, 2), lambda name, p, module: (p.abs() < 9).all())) == ["weight", "bias"]


@pytest.mark.parametrize(
    "function",
    [select_parameters, sparsity, find_dropout, lambda module: decay_groups(module, 0.1)],
    ids=["select_parameters", "sparsity", "find_dropout", "decay_groups"],
)
def test_something_else_in_place_of_a_module_raises(function):
    with pytest.raises(TypeError, match=r": expected a module, got the class Linear: create one, as in Linear\(…\)"):
        function(nn.Linear)
    with pytest.raises(TypeError, match=r": expected a module, got L1Penalty\(0.1\): pass the model itself"):
        function(L1Penalty(0.1))


def test_model_without_weights_raises_with_what_is_left_out():
    with pytest.raises(
        ValueError,
        match=r"params='weights' selects no parameter; .weights. leaves out normalization \(weight\), biases \(bias\)",
    ):
        select_parameters(nn.LayerNorm(4))


def test_select_modules_by_glob_and_class():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert list(select_modules(model, ["ReLU"])) == ["1", "2.1"]
    assert list(select_modules(model, ["2.*"])) == ["2.0", "2.1"]
    with pytest.raises(ValueError, match="no module has a name or class that matches 'Relu'; close matches: ReLU"):
        select_modules(model, ["Relu"])


def test_unknown_name_raises_in_fit():
    with pytest.raises(
        ValueError, match=r"L1Penalty: params: no parameter has a name that matches 'nett.\*'; close matches: net.4.bias"
    ):
        fit([L1Penalty(0.1, params="nett.*")])


class LateLayers(Classifier):
    """A model whose layers do not exist yet in ``setup`` of the callbacks."""

    def __init__(self):
        super().__init__()
        self.later = self.net
        del self.net
        self.hidden = [self.later]
        del self.later

    def configure_model(self):
        self.net = self.hidden[0]


def test_modules_built_in_configure_model_are_found():
    callback = RecordedPenalty(0.1, inject="gradient")
    fit([callback], LateLayers())
    assert callback.seen == ["net.0.weight", "net.4.weight"]
    with pytest.raises(ValueError, match=r"L1Penalty: params: no parameter has a name that matches 'nett.\*'"):
        fit([L1Penalty(0.1, params="nett.*")], LateLayers())


class RecordedPenalty(L1Penalty):
    """Records which parameters it gets."""

    def gradients(self, params, optimizer, step):
        names = {id(p): name for name, p in self.tensors.items()}
        self.seen = [names[id(p)] for p in params]


def test_frozen_parameters_are_skipped_until_unfrozen():
    model, callback = Classifier(), RecordedPenalty(0.1, inject="gradient")
    model.net[0].requires_grad_(False)
    fit([callback], model)
    assert callback.seen == ["net.4.weight"]
    model.net[0].requires_grad_(True)
    fit([callback], model)
    assert callback.seen == ["net.0.weight", "net.4.weight"]


def test_frozen_selection_raises_or_warns():
    model = Classifier()
    model.net[0].requires_grad_(False)
    model.net[4].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="params='weights' selects no parameter: all weights are frozen"):
        fit([L1Penalty(0.1)], model)
    with pytest.warns(UserWarning, match="L1Penalty-net_0 has no effect for now: all 2 selected parameters are frozen"):
        fit([L1Penalty(0.1, params="net.0.*")], model)


def test_parameters_outside_optimizers_warn():
    class HeadOnly(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[4].parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="all 1 selected parameters are not in any optimizer"):
        fit([L1Penalty(0.1, params="net.0.weight")], HeadOnly())
