"""Dropout that a module applies itself: it reads the rate of a child, or its own attribute, and its own training mode.

The models are small copies of what transformers and timm do.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import QUIET, Classifier, fit, loader
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from lightning_reg import DropoutInjection, DropoutScheduler, Linear, MonteCarloDropout
from lightning_reg.dropout.readers import find_readers


def eager_attention(module, q, k, v, dropout=0.0):
    """As in transformers: a function that asks for the mode of the module that calls it."""
    weights = functional.dropout((q @ k.transpose(-2, -1)).softmax(-1), p=dropout, training=module.training)
    return weights @ v


def sdpa_attention(module, q, k, v, dropout=0.0):
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class BertSelfAttention(nn.Module):
    def __init__(self, attend=sdpa_attention):
        super().__init__()
        self.dropout, self.attend = nn.Dropout(0.5), attend

    def forward(self, x):
        return self.attend(self, x, x, x, dropout=0.0 if not self.training else self.dropout.p)


class GradientCheckpointingLayer(nn.Module):
    gradient_checkpointing = False

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise AssertionError("not here")
        return super().__call__(*args, **kwargs)


class GPT2Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.5), nn.Dropout(0.1)

    def forward(self, x):
        x = eager_attention(self, x, x, x, dropout=self.attn_dropout.p if self.training else 0.0)
        return self.resid_dropout(x)


class TimmAttention(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.attn_drop, self.fused_attn = nn.Dropout(0.5), fused

    def forward(self, x):
        if self.fused_attn:
            return functional.scaled_dot_product_attention(x, x, x, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.attn_drop((x @ x.transpose(-2, -1)).softmax(-1)) @ x


class LlamaAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.5

    def forward(self, x):
        return eager_attention(self, x, x, x, dropout=0.0 if not self.training else self.attention_dropout)


class BartEncoderLayer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.dropout, self.activation_dropout = 0.1, 0.5

    def forward(self, x):
        x = functional.dropout(x, p=self.activation_dropout, training=self.training)
        return functional.dropout(x + x, p=self.dropout, training=self.training)


class BartEncoder(BartEncoderLayer):
    layerdrop = 0.0

    def forward(self, x):
        if self.training and self.layerdrop > 0.0:
            x = x * (torch.rand([]) < self.layerdrop)
        return super().forward(x)


class TimmResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.drop_rate = nn.BatchNorm1d(8), 0.5

    def forward_head(self, x):
        if self.drop_rate:
            x = functional.dropout(x, p=float(self.drop_rate), training=self.training)
        return x

    def forward(self, x):
        return self.forward_head(self.bn(x))


class DropBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        return x * (torch.rand_like(x) > self.drop_prob)


class ByStatement(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        dropout_p = 0.0
        if self.training:
            dropout_p = self.drop.p
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return functional.dropout(x, self.drop.p, self.training)


class Predicts(LightningModule):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, x):
        return self.layer(x)

    def on_predict_batch_start(self, batch, batch_idx):
        torch.manual_seed(0)

    def predict_step(self, batch, batch_idx):
        self.modes = {name: module.training for name, module in self.named_modules()}
        return self(batch[0].view(-1, 8, 8))


def predict(callbacks, model, **kwargs):
    trainer = Trainer(**{**QUIET, **kwargs}, callbacks=callbacks)
    return trainer.predict(model, loader(16))[0]


PARENTS = {
    "BERT": BertSelfAttention,
    "BERT, eager": lambda: BertSelfAttention(eager_attention),
    "GPT-2": GPT2Attention,
    "ViT": TimmAttention,
    "ViT, not fused": lambda: TimmAttention(False),
    "Llama": LlamaAttention,
    "BART layer": BartEncoderLayer,
    "BART": BartEncoder,
    "ResNet": TimmResNet,
    "DropBlock": DropBlock,
    "statement": ByStatement,
    "functional": ByName,
}


@pytest.mark.parametrize("make", PARENTS.values(), ids=PARENTS)
def test_predictions_are_those_of_training_mode_to_the_last_bit(make):
    """Of a model whose modules are all in training mode, except for batch normalization."""
    model = Predicts(make())
    first, second = predict([MonteCarloDropout(2)], model)
    assert not torch.equal(first, second)
    assert not any(module.training for module in model.modules())
    plain = predict([], model)
    assert torch.equal(plain, predict([], model))
    batch = next(iter(loader(16)))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = [model.predict_step(batch, 0) for _ in range(2)]
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_switching_the_child_alone_would_change_nothing():
    """The negative control."""
    model = Predicts(BertSelfAttention())
    plain = predict([], model)
    model.layer.dropout.training = True
    with torch.inference_mode():
        assert torch.equal(model.predict_step(next(iter(loader(16))), 0), plain)


def test_only_what_applies_dropout_is_in_training_mode():
    model = Predicts(nn.Sequential(TimmResNet(), nn.Linear(8, 8), TimmAttention(), nn.LayerNorm(8)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    predict([MonteCarloDropout(2)], model)
    assert {name for name, training in model.modes.items() if training} == {"layer.0", "layer.2", "layer.2.attn_drop"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_error_leaves_every_mode_as_it_was():
    class Fails(Predicts):
        def predict_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    model = Fails(TimmAttention())
    with pytest.raises(RuntimeError, match="stop"):
        predict([MonteCarloDropout(2)], model)
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "predict_step" not in vars(model)


class Auxiliary(BertSelfAttention):
    """A module that does something else in training mode too."""

    def forward(self, x):
        x = super().forward(x)
        if self.training:
            x = x + torch.randn_like(x)
        return x


class Normalizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop_rate = 0.5
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        x = functional.batch_norm(x, self.mean, self.var, training=self.training)
        return functional.dropout(x, self.drop_rate, self.training)


class DropsLayers(BartEncoder):
    layerdrop = 0.3


class NoisyDropout(nn.BatchNorm1d):
    """Batch normalization is never switched, whatever its source code looks like."""

    def __init__(self):
        super().__init__(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return functional.dropout(super().forward(x), self.drop.p, self.training)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Auxiliary, "if self.training:"),
        (Normalizes, r"functional.batch_norm\(x, self.mean, self.var, training=self.training\)"),
        (DropsLayers, "if self.training and self.layerdrop > 0.0:"),
    ],
)
def test_what_cannot_be_switched_on_is_named(make, why):
    model = Predicts(nn.Sequential(make(), DropBlock()))
    with pytest.warns(
        UserWarning,
        match=rf"MonteCarloDropout: cannot switch on the dropout that {make.__name__} applies itself \(layer.0\), .*'{why}'",
    ):
        predict([MonteCarloDropout(2)], model)
    assert not model.modes["layer.0"]


def test_a_module_that_the_user_registers_is_switched_on_all_the_same():
    model = Predicts(Normalizes())
    predict([MonteCarloDropout(2, attributes={"Normalizes": "drop_rate"})], model)
    assert model.modes["layer"]


class Hides(nn.Module):
    """Reads a rate in a way that its source code does not show."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return functional.dropout(x, vars(self)["_modules"]["drop"].p if self.training else 0.0)


@pytest.mark.parametrize("make", [Hides, NoisyDropout])
def test_dropout_that_never_ran_is_named(make):
    model = Predicts(make())
    with pytest.warns(
        UserWarning, match=r"switched on, but never ran in the first predicted batch: layer.drop \(Dropout 0.5\)"
    ):
        predict([MonteCarloDropout(2)], model)
    assert not any(module._forward_pre_hooks for module in model.modules())


SOURCE = """
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return functional.dropout(x, self.drop.p, self.training)
"""


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_that_was_changed_after_its_import_is_not_read(tmp_path):
    """Its lines are not those that run."""
    path = tmp_path / "model_of_a_user.py"
    path.write_text(SOURCE)
    one, two = load(path), load(path)
    assert [reader.rates for reader in find_readers(one.Attention())] == [{"drop.p": 0.5}]
    path.write_text(SOURCE.replace("return functional", "x = 1 * x\n        return functional"))
    assert find_readers(two.Attention()) == []
    with pytest.warns(UserWarning, match=r"never ran in the first predicted batch: layer.drop \(Dropout 0.5\)"):
        predict([MonteCarloDropout(2)], Predicts(two.Attention()))


def test_code_without_source_is_not_read():
    names = {}
    exec(SOURCE, names)
    assert find_readers(names["Attention"]()) == []


def test_injected_dropout_that_never_ran_is_named():
    model = Predicts(DropBlock())
    model.unused = nn.ReLU()
    with pytest.warns(UserWarning, match=r"never ran in the first predicted batch: unused \(DropoutInjection 0.3\)"):
        predict([MonteCarloDropout(2), DropoutInjection(0.3, after="ReLU")], model)


def test_a_rate_that_is_read_in_eval_mode_too_runs():
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return functional.scaled_dot_product_attention(x, x, x, dropout_p=self.drop.p)

    first, second = predict([MonteCarloDropout(2)], Predicts(Always()))
    assert not torch.equal(first, second)


def test_numbers_that_are_not_for_dropout_are_left_alone():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.std = nn.Dropout(0.5), 0.1

        def forward(self, x):
            std = self.std if self.training else 0.0
            return self.drop(x) + std * torch.randn_like(x)

    model = Predicts(Noise())
    predict([MonteCarloDropout(2)], model)
    assert not model.modes["layer"]
    assert find_readers(model) == []


def test_a_model_whose_only_dropout_is_in_attributes_has_dropout():
    model = Predicts(LlamaAttention())
    model.layer.attention_dropout = 0.0
    with pytest.warns(UserWarning, match=r"all dropout rates are 0, .*: LlamaAttention: layer"):
        predict([MonteCarloDropout(2)], model)


def test_the_readers_of_a_model():
    model = nn.Sequential(TimmAttention(), BartEncoderLayer(), nn.Linear(2, 2), nn.Dropout(0.1), TimmResNet())
    readers = find_readers(model)
    assert [(reader.name, reader.rates) for reader in readers] == [
        ("0", {"attn_drop.p": 0.5}),
        ("1", {"activation_dropout": 0.5, "dropout": 0.1}),
        ("4", {"drop_rate": 0.5}),
    ]
    assert readers[0].reads == {(id(model[0].attn_drop), "p")}
    assert all(reader.is_switchable for reader in readers)
    model[1].gradient_checkpointing = True
    assert find_readers(model)[1].stays_off


class Trains(Classifier):
    def __init__(self, layer, backend=None):
        super().__init__()
        self.body = layer if backend is None else torch.compile(layer, backend=backend)

    def training_step(self, batch, batch_idx):
        x = self.body(batch[0].view(-1, 8, 8))
        return super().training_step((x.flatten(1), batch[1]), batch_idx)


def test_a_scheduler_sets_the_rate_of_a_child_and_names_attributes_that_it_does_not_know():
    with pytest.warns(
        UserWarning, match=r"keep dropout rates in attributes that are not scheduled; .* attributes={'LlamaAttention': 'atten"
    ):
        fit([DropoutScheduler(0.3)], Trains(LlamaAttention()), max_epochs=1)
    model = Trains(LlamaAttention())
    model.net[3] = nn.Identity()
    with pytest.raises(ValueError, match=r"no dropout to schedule.*attributes={'LlamaAttention': 'attention_dropout'}"):
        fit([DropoutScheduler(0.3)], model)
    fit([DropoutScheduler(0.3, attributes={"LlamaAttention": "attention_dropout"})], Trains(LlamaAttention()))
    fit([DropoutScheduler({"net.3": 0.3})], Trains(LlamaAttention()))  # neither warns


@pytest.mark.parametrize(("schedule", "warns"), [(Linear(0.0, 0.5), True), (0.3, False)])
def test_compiled_code_that_reads_the_rate_of_a_child_is_warned_of(schedule, warns, recwarn):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    fit([DropoutScheduler(schedule, modules="body.*")], Trains(TimmAttention(), counter), max_epochs=2)
    said = [str(w.message) for w in recwarn if "recompiles the model" in str(w.message)]
    assert bool(said) is warns
    assert all("Dropout 0.5: body.attn_drop (read as a number by body): torch recompiles" in message for message in said)
    assert (counter.frame_count > 1) is warns
    torch._dynamo.reset()


def test_compiled_code_that_calls_the_child_is_not_warned_of(recwarn):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    fit([DropoutScheduler(Linear(0.0, 0.5), modules="body.*")], Trains(body, counter), max_epochs=2)
    assert counter.frame_count == 1
    assert not [w for w in recwarn if "recompiles the model" in str(w.message)]
    torch._dynamo.reset()


def test_predictions_of_a_compiled_parent_have_a_spread():
    torch._dynamo.reset()
    model = Predicts(torch.compile(BertSelfAttention(), backend="eager"))
    first, second = predict([MonteCarloDropout(2)], model)
    assert not torch.equal(first, second)
    torch._dynamo.reset()
