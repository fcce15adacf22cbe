"""Which parameters count as weights, on architectures as others write them, and which keywords select the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import Classifier, fit
from torch import nn

from lightning_reg import (
    WEIGHT_LAYERS,
    ActivityPenalty,
    DropoutInjection,
    DropoutScheduler,
    L1Penalty,
    L2Penalty,
    MaxNorm,
    WeightPruning,
    decay_groups,
    select_parameters,
)
from lightning_reg._engine.module_selection import select_modules
from lightning_reg._engine.selection import left_out
from lightning_reg.functional import Units, units_of


def bare(*shape):
    return nn.Parameter(torch.ones(shape))


class VisionTransformer(nn.Module):
    """As in timm and torchvision: a class token and a position embedding beside the layers."""

    def __init__(self):
        super().__init__()
        self.cls_token = bare(1, 1, 8)
        self.reg_token = bare(1, 4, 8)  # two dimensions larger than 1
        self.pos_embed = bare(1, 17, 8)
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.head = nn.Linear(8, 1)


class ConvNeXtBlock(nn.Module):
    """A layer scale of shape (C, 1, 1), and global response normalization's of shape (1, 1, 1, C)."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.layer_scale = bare(8, 1, 1)
        self.gamma_1 = bare(8)
        self.pointwise = nn.Linear(8, 32)
        self.grn_shift = bare(1, 1, 1, 32)


POSITIONS = (
    "W_pos",  # of PatchTST in tsai and neuralforecast
    "position_enc",  # of PatchTST in transformers
    "pos_emb",
    "pos_embed",
    "pos_embedding",
    "position_embeddings",
    "positional_embedding",  # of CLIP
    "positional_encoding",
)


@pytest.mark.parametrize("name", POSITIONS)
def test_position_embeddings_are_no_weights(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    setattr(model[1], name, bare(6, 4))
    assert list(select_parameters(model)) == ["0.weight"]
    assert list(select_parameters(model, "embeddings")) == [f"1.{name}"]
    assert left_out(model, "weights")["position embeddings and tokens"] == [f"1.{name}"]


@pytest.mark.parametrize("name", ["W_V", "pos_weight", "compose", "encoding", "purpose_weight"])
def test_other_matrices_are_weights(name):
    model = nn.Module()
    setattr(model, name, bare(6, 4))
    assert list(select_parameters(model)) == [name]


@pytest.mark.parametrize("class_name", ["RevIN", "RevINMultivariate", "RMSNorm", "ReversibleInstanceNorm1d"])
def test_scales_of_normalization_are_no_weights(class_name):
    """Of shape (1, 1, features), as for several series."""
    layer = type(class_name, (nn.Module,), {})()
    layer.affine_weight = bare(1, 1, 5)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert list(select_parameters(model)) == ["0.weight"]
    assert list(select_parameters(model, "norms")) == ["1.affine_weight"]


class SwinV2Attention(nn.Module):
    """A logit scale for each head, and a table of relative positions."""

    def __init__(self):
        super().__init__()
        self.logit_scale = bare(4, 1, 1)
        self.relative_position_bias_table = bare(169, 4)
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
        self.qkv = nn.Linear(8, 24, bias=False)


class Mamba(nn.Module):
    """A selective state-space layer."""

    def __init__(self):
        super().__init__()
        self.A_log = bare(16, 8)
        self.D = bare(16)
        self.dt_bias = bare(16)
        self.conv1d = nn.Conv1d(16, 16, 4, groups=16)
        self.in_proj = nn.Linear(8, 32)


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: the weight has shape (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Own(nn.Module):
    """Parameters of a module of unknown type."""

    def __init__(self):
        super().__init__()
        self.weight = bare(1, 16)
        self.kernel = bare(16, 1)
        self.gate_weight = bare(1, 1)
        self.mixing = bare(4, 3)
        self.WD = bare(4, 3)
        self.skip_D = bare(4, 3)
        self.slopes = nn.ParameterList([bare(3, 3), bare(3, 1)])
        self.prompt_tokens = nn.ParameterList([bare(3, 3)])
        self.prelu = nn.PReLU(4)


WEIGHTS = {
    VisionTransformer: [
        "patch_embed.weight",
        "block.self_attn.in_proj_weight",
        "block.self_attn.out_proj.weight",
        "block.linear1.weight",
        "block.linear2.weight",
        "head.weight",
    ],
    ConvNeXtBlock: ["depthwise.weight", "pointwise.weight"],
    SwinV2Attention: ["cpb_mlp.0.weight", "cpb_mlp.2.weight", "qkv.weight"],
    Mamba: ["conv1d.weight", "in_proj.weight"],
    Own: ["weight", "kernel", "gate_weight", "mixing", "WD", "slopes.0"],
}


@pytest.mark.parametrize("model", WEIGHTS, ids=lambda model: model.__name__)
def test_weights_are_what_multiplies_the_inputs(model):
    assert list(select_parameters(model())) == WEIGHTS[model]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (5, 1), (5, 3)], ids=str)
def test_a_bare_weight_counts_whatever_its_shape(shape):
    """As in a linear model from a textbook, whose weights are a vector."""
    for name in ("weight", "kernel", "gate_weight"):
        model = nn.Module()
        model.register_parameter(name, bare(*shape))
        model.register_parameter("intercept", bare(1))
        assert list(select_parameters(model)) == [name]


@pytest.mark.parametrize(
    ("name", "parent", "is_norm", "reason"),
    [
        ("LlamaRMSNorm", nn.Module, True, "normalization"),
        ("RMSNormGated", nn.Module, True, "normalization"),
        ("BatchNormAct2d", nn.Module, True, "normalization"),
        ("LayerNormalization", nn.Module, True, "normalization"),
        ("LayerScale", nn.Module, False, "scales"),
        ("Scale2d", nn.Module, False, "scales"),
        ("MyPReLU", nn.PReLU, False, "slopes"),
        ("NormalizedLinear", nn.Module, False, ""),
        ("ScaledLinear", nn.Module, False, ""),
        ("Affine", nn.Module, False, ""),
    ],
)
def test_a_vector_called_weight_is_judged_by_its_class(name, parent, is_norm, reason):
    layer = type(name, (parent,), {})()
    layer.weight = bare(4)
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(4, 2)})
    assert list(select_parameters(model)) == [*([] if reason else ["layer.weight"]), "head.weight"]
    assert ("layer.weight" in select_parameters(model, ["norms", "head.bias"])) == is_norm
    assert left_out(model, "weights").get(reason, []) == (["layer.weight"] if reason else [])


@pytest.mark.parametrize("name", ["NormLinear", "ScaleLinear"])
def test_a_matrix_counts_in_a_class_that_mentions_a_norm_or_a_scale(name):
    layer = type(name, (nn.Module,), {})()
    layer.weight = bare(4, 3)
    assert list(select_parameters(layer)) == ["weight"]
    layer = type("LayerNorm2d", (nn.Module,), {})()  # the class is a norm
    layer.weight, layer.linear = bare(4, 3), nn.Linear(2, 2)
    assert list(select_parameters(layer)) == ["linear.weight"]


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.Linear(16, 1), ["weight"]),
        (nn.Linear(1, 1), ["weight"]),
        (nn.LazyLinear(4), ["weight"]),
        (nn.Conv1d(1, 1, 3), ["weight"]),
        (nn.Bilinear(1, 1, 1), ["weight"]),
        (nn.Embedding(1, 1), ["weight"]),
        (nn.LSTM(1, 4, proj_size=1), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRUCell(1, 1), ["weight_ih", "weight_hh"]),
        (
            nn.MultiheadAttention(4, 1, add_bias_kv=True, kdim=1, vdim=1),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (type("LinearWithGate", (nn.Linear,), {})(4, 1), ["weight"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_of_known_layers_count_whatever_their_shape(layer, weights):
    assert list(select_parameters(layer)) == weights


def test_what_a_subclass_of_a_known_layer_adds_is_judged_by_name():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.logit_scale, self.lora_a, self.shift = bare(3, 1), bare(1, 4), bare(3)

    assert list(select_parameters(Scaled())) == ["weight", "lora_a"]


class Timm(nn.Module):
    """Names what its optimizer should not decay, as timm's models do."""

    def __init__(self):
        super().__init__()
        self.tokens_table = nn.Embedding(4, 8)
        self.absolute = bare(4, 8)
        self.head = nn.Linear(8, 2)

    def no_weight_decay(self):
        return {"absolute", "tokens_table.*"}


def test_no_weight_decay_of_any_module_wins():
    assert list(select_parameters(Timm())) == ["head.weight"]
    nested = nn.ModuleDict({"backbone": Timm(), "absolute": Own()})
    assert list(select_parameters(nested, "weights:backbone.*")) == ["backbone.head.weight"]
    assert left_out(nested, "weights:backbone.*")["no_weight_decay()"] == ["backbone.absolute", "backbone.tokens_table.weight"]


def test_a_glob_still_reaches_what_does_not_count():
    assert list(select_parameters(Timm(), ["weights", "absolute"])) == ["absolute", "head.weight"]
    assert list(select_parameters(VisionTransformer(), "pos_embed")) == ["pos_embed"]


def test_an_attribute_of_that_name_is_no_list_of_names():
    model = nn.Linear(2, 2)
    model.no_weight_decay = True
    assert list(select_parameters(model)) == ["weight"]


# Keywords -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = bare(1, 4, 8)
        self.embed = nn.Embedding(5, 8)
        self.encoder = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.head = nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("weights", ["embed.weight", "encoder.fc.weight", "head.weight"]),
        ("biases", ["encoder.fc.bias", "encoder.norm.bias", "head.bias"]),
        ("norms", ["encoder.norm.weight", "encoder.norm.bias"]),
        ("embeddings", ["pos_embed", "embed.weight"]),
        ("weights:encoder.*", ["encoder.fc.weight"]),
        ("biases:encoder.*", ["encoder.fc.bias", "encoder.norm.bias"]),
        (["weights", "!embeddings"], ["encoder.fc.weight", "head.weight"]),
        (
            ["all", "!norms", "!biases:head.*"],
            ["pos_embed", "embed.weight", "encoder.fc.weight", "encoder.fc.bias", "head.weight"],
        ),
        (["weights", "!weights:encoder.*"], ["embed.weight", "head.weight"]),
        (
            ["weights:head.*", "encoder.*"],
            ["encoder.fc.weight", "encoder.fc.bias", "encoder.norm.weight", "encoder.norm.bias", "head.weight"],
        ),
        (("weights", "!head.*"), ["embed.weight", "encoder.fc.weight"]),
    ],
    ids=str,
)
def test_keywords(params, names):
    assert list(select_parameters(Encoder(), params)) == names


def test_a_keyword_that_excludes_nothing_is_no_error_but_a_glob_is():
    model = nn.Linear(2, 2)
    assert list(select_parameters(model, ["weights", "!embeddings", "!norms"])) == ["weight"]
    with pytest.raises(ValueError, match="no parameter has a name that matches '!norm"):
        select_parameters(model, ["weights", "!norm.*"])
    with pytest.raises(ValueError, match="no parameter has a name that matches 'weights:encoder"):
        select_parameters(model, "weights:encoder.*")


class ListConfig(Sequence):
    """A list that is not a list, as OmegaConf's."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)

    def __repr__(self):
        return repr(list(self.items))


def test_any_sequence_is_a_list():
    params = ListConfig("weights", "!net.4.*")
    callback = L2Penalty(0.1, params=params)
    assert callback.params is params
    assert repr(callback) == "L2Penalty(0.1, params=['weights', '!net.4.*'])"
    assert callback.name == "L2Penalty-weights-net_4"
    fit([callback, DropoutInjection(0.1, after=ListConfig("ReLU", "net.0"))])
    assert list(select_parameters(Classifier(), params)) == ["net.0.weight"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            nn.Linear(2, 2),
            "L2Penalty: params must name parameters, got a module of class Linear: write the name of this Linear",
        ),
        ([nn.Linear(2, 2)], "write the name of this Linear in the model, as in params='encoder"),
        (nn.Linear, r"write a function, as in params=lambda name, parameter, module: isinstance\(module, Linear\)"),
        (nn.Linear(2, 2).weight, "write its name, as in params='head.weight'"),
        (3, "got 3: write one of 'weights', 'all', 'biases', 'norms', 'embeddings', a glob"),
        ([lambda name, parameter, module: True], "write one of 'weights'"),
        (L2Penalty, "got the class L2Penalty: write one of 'weights'"),
        ([["weights"]], r"got \['weights'\]: write one of 'weights'"),
        ({"weights"}, "a list of these"),
        (np.array(["weights"]), "a list of these"),
        ({"encoder": 1}, "write one of 'weights'"),
        (b"weights", "write one of 'weights'"),
    ],
    ids=[
        *["module", "list of a module", "class", "tensor", "number", "list of a function", "class of callbacks"],
        *["nested list", "set", "array", "mapping", "bytes"],
    ],
)
def test_what_is_no_name_is_refused_with_what_to_write(params, message):
    with pytest.raises(TypeError, match=message):
        L2Penalty(0.1, params=params)
    with pytest.raises(TypeError, match="select_parameters: params must name parameters"):
        select_parameters(nn.Linear(2, 2), params)


def test_a_module_suggests_its_parameters():
    with pytest.raises(ValueError, match=r"matches 'encoder'; it is a module: write 'encoder\.\*'"):
        select_parameters(Encoder(), "encoder")
    with pytest.raises(ValueError, match=r"it is a module: write '!weights:encoder.fc\.\*'"):
        select_parameters(Encoder(), ["weights", "!weights:encoder.fc"])


def test_a_selection_that_leaves_nothing_says_what_was_left_out():
    model = nn.Module()
    model.cls_token, model.norm, model.alpha = bare(1, 1, 4), nn.LayerNorm(4), bare(1)
    expected = (
        r"params='weights' selects no parameter; 'weights' leaves out position embeddings and tokens \(cls_token\), scales "
        r"\(alpha\), normalization \(norm.weight\), biases \(norm.bias\)"
    )
    with pytest.raises(ValueError, match=expected):
        select_parameters(model)


def test_decay_groups_follow_the_same_rules():
    decayed, others = decay_groups(Timm(), 0.1)
    assert [p.shape for p in decayed["params"]] == [(2, 8)]
    assert len(others["params"]) == 3


# Layers that are registered -----------------------------------------------------------------------------------------


def test_units_of_a_layer_that_stores_inputs_first():
    assert units_of(Conv1D(3, 5)) == Units(1)
    assert units_of(type("Conv1D", (nn.Conv1d,), {})(3, 5, 2)) == Units(0)
    assert list(select_parameters(Conv1D(1, 16))) == ["weight"]


class Generator(Classifier):
    """A classifier whose first layer is Hugging Face's."""

    def __init__(self, layer=Conv1D):
        super().__init__()
        self.net[0] = layer(16, 64)


def test_outputs_are_bounded_penalized_and_pruned_not_inputs():
    model = fit([MaxNorm(0.5, params="weights:net.0.*")], Generator())
    weight = model.net[0].weight.detach()
    assert weight.shape == (64, 16)
    torch.testing.assert_close(weight.norm(dim=0).amax(), torch.tensor(0.5))
    assert weight.norm(dim=1).amax() < 0.45  # the negative control: inputs are not what is bounded
    pruned = fit([WeightPruning(0.5, structure="unit", scope="layer", params="weights:net.0.*")], Generator()).net[0].weight
    assert (pruned == 0).all(dim=0).sum() == 8
    assert (pruned == 0).all(dim=1).sum() == 0


@pytest.fixture
def _registry():
    """Forget what a test registers."""
    saved = dict(WEIGHT_LAYERS)
    yield
    WEIGHT_LAYERS.clear()
    WEIGHT_LAYERS.update(saved)


class Transposed(nn.Module):
    def __init__(self, out_features, in_features):
        super().__init__()
        self.table = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return x @ self.table + self.bias


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("key", [Transposed, "Transposed"], ids=["class", "name"])
def test_a_registered_layer_is_known(key):
    assert units_of(Transposed(1, 4)) == Units(0)
    with pytest.raises(ValueError, match=r"'weights' leaves out vectors \(table\), biases \(bias\)"):
        select_parameters(Transposed(1, 4))
    WEIGHT_LAYERS[key] = Units(1)
    assert list(select_parameters(Transposed(1, 4))) == ["table"]
    model = fit([MaxNorm(0.5, params="weights:net.0.*")], Generator(Transposed))
    torch.testing.assert_close(model.net[0].table.norm(dim=0).amax(), torch.tensor(0.5))


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("key", "layout", "error", "message"),
    [
        (Transposed, 1, TypeError, r"WEIGHT_LAYERS\[Transposed\] must be Units, or a function .*, got 1"),
        ("Transposed", lambda module: None, TypeError, r"WEIGHT_LAYERS\['Transposed'\] must be Units, .* got None"),
        (
            Transposed(2, 2),
            Units(1),
            TypeError,
            "each key must be a class of modules or its name, such as 'Conv1D', got Transposed",
        ),
        (int, Units(1), TypeError, "each key must be a class of modules"),
        (
            "Transposed",
            Units(2),
            ValueError,
            r"output units of Transposed are in dimension 2, but 'net.0.table' has shape \(64, 16\)",
        ),
    ],
    ids=["number", "function", "module", "class", "dimension"],
)
def test_a_bad_entry_is_named(key, layout, error, message):
    WEIGHT_LAYERS[key] = layout
    with pytest.raises(error, match=message):
        fit([L1Penalty(0.1)], Generator(Transposed))


# Modules ------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
        self.embed = nn.Embedding(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.empty = nn.ModuleList()
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))
        self.softmax = nn.Softmax(dim=-1)


def test_a_star_means_the_layers_before_the_output():
    expected = ["embed", "attention", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]
    assert list(select_modules(Branches(), "*")) == expected
    assert list(select_modules(Branches(), ["*", "!blocks.1.*", "!Embedding"])) == expected[1:4]
    assert list(select_modules(Branches(), ["*", "head"])) == [*expected, "head"]
    fit([DropoutInjection(0.1, after="*")])
    message = r"'\*' means the layers before the last one that has parameters, but the model has none; name modules, as in '0'"
    with pytest.raises(ValueError, match=message):
        select_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*")


def test_module_patterns_exclude():
    model = Branches()
    assert list(select_modules(model, ["blocks.*", "!ReLU", "!blocks.?"])) == ["blocks.0.0", "blocks.1.0"]
    with pytest.raises(ValueError, match=r"no module has a name or class that matches 'block'; close matches: blocks"):
        select_modules(model, ["ReLU", "!block"])
    with pytest.raises(ValueError, match=r"start with what to include, as in \['ReLU', '!head.\*'\]"):
        select_modules(model, ["!ReLU"])
    with pytest.raises(ValueError, match="everything that it includes is excluded"):
        select_modules(model, ["ReLU", "!blocks.*"])


def test_a_tied_module_is_excluded_under_any_name():
    shared = nn.ReLU()
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.ReLU()})
    assert list(select_modules(model, ["ReLU", "!b"])) == ["c"]


def test_the_scheduler_excludes_too():
    model = Classifier()
    model.extra = nn.Dropout(0.2)
    scheduler = DropoutScheduler(0.4, modules=["*", "!extra"])
    assert [site.name for site in scheduler.assign(model, [])["p"]] == ["net.3"]


@pytest.mark.parametrize(
    "make",
    [
        lambda what: DropoutInjection(0.1, after=what),
        lambda what: ActivityPenalty(0.1, modules=what),
        lambda what: DropoutScheduler(0.1, modules=what),
    ],
    ids=["after", "modules", "scheduler"],
)
def test_a_class_or_a_module_in_place_of_a_name_says_what_to_write(make):
    for nothing in ([], "", "!ReLU"):
        with pytest.raises(ValueError, match="as in "):
            make(nothing)
    with pytest.raises(TypeError, match="must name modules, got the class ReLU: write the name of the class, 'ReLU'"):
        make(nn.ReLU)
    with pytest.raises(
        TypeError, match=r"got a module of class ReLU: write its name in the model, such as 'encoder.0', or .*, 'ReLU'"
    ):
        make(["net.0", nn.ReLU()])
    with pytest.raises(TypeError, match="got 3: write a name such as"):
        make(3)
