"""Every callback, alone and all together, on models that nobody here wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import QUIET, seed, set_width, traces, words
from table import ROWS
from torch.testing import assert_close
from torch.utils.data import DataLoader
from zoo.effects import CASES, FREE, STEPS, TOGETHER, Drops, Validated, Watched, rates_in_training, together
from zoo.models import MODELS, plain

import lightning_reg
from lightning_reg import ActivityPenalty, DropoutInjection, DropoutScheduler, MonteCarloDropout

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft's own
    "ignore:PeakGradientDropping with k=1 drops every entry of model.head.bias",  # of the forecaster, as it should
    "ignore:NonFiniteGradientGuard.*infinite or NaN gradients at step",  # the zoo gives it a bad batch
    "ignore:NonNegative-all-weights has no effect for now. all 18 selected parameters are frozen",  # under LoRA, as it should
)

every_model = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODELS])
every_callback = pytest.mark.parametrize("callback", CASES)


def data(model):
    """Return the batches of an epoch."""
    return DataLoader([model.batch() for _ in range(STEPS // 2)], batch_size=None)


def watched(model, case):
    """Return a new model that checks a case after each step, from a fixed start."""
    seed(0)
    module = model.build()
    module.__class__ = type(f"Watched{type(module).__name__}", (Validated if case.validates else Watched, type(module)), {})
    module.watch(model, case)
    return module


def fit(model, case, callbacks):
    """Train, check that nothing is left in the model, and return the model and its trainer."""
    module = watched(model, case)
    before = traces(module)
    trainer = model.lightning.Trainer(**QUIET, max_epochs=2, callbacks=callbacks)
    trainer.fit(module, data(model), data(model) if case.validates else None)
    assert module.steps == STEPS
    assert traces(module) == before
    for name, p in module.named_parameters():
        assert p.requires_grad or torch.equal(p, module.start[name]), f"{name} is frozen"
    return module, trainer


def check_checkpoint(model, module, trainer, path):
    """The state dict in a checkpoint has the keys of the plain model, which loads it and computes the same."""
    trainer.save_checkpoint(path)
    prefix = "" if plain(module) is module else "model."
    state = {key.removeprefix(prefix): tensor for key, tensor in torch.load(path)["state_dict"].items()}
    fresh = model.build()
    assert list(state) == list(plain(fresh).state_dict())
    plain(fresh).load_state_dict(state, strict=True)
    batch = model.batch()
    outputs = [network.eval().predict_step(batch, 0) for network in (fresh, module)]
    assert_close(outputs[0], outputs[1], rtol=0.0, atol=0.0)


def test_every_callback_has_a_case():
    assert CASES.keys() == ROWS.keys()
    model = MODELS["timm ViT"]
    assert {type(case.active(case.strength, model)).__name__ for case in CASES.values()} == set(ROWS)
    assert {type(callback).__name__ for callback in together(model)} == {name for name, row in ROWS.items() if not row.options}


@every_model
@every_callback
def test_callback_alone(name, callback, tmp_path, record_property):
    model, case = MODELS[name], CASES[callback]
    if not model.drops and callback in ("DropoutScheduler", "MonteCarloDropout"):
        with pytest.raises(ValueError, match=rf"^{callback}: the model has no dropout.*attributes="):
            fit(model, case, [case.active(case.strength, model)])
        record_property("measured", "clear error")
        return
    module, trainer = fit(model, case, [case.active(case.strength, model)])
    check_checkpoint(model, module, trainer, tmp_path / "model.ckpt")
    record_property("measured", measured(callback, module))
    if case.changes_training and "Dropout" not in callback:  # dropout is part of what the data gradient is computed from
        assert max(module.changes) > 1e-5


def measured(callback, module):
    """Return a number for a report: the share of zeros of dropout, or the largest relative change in a step."""
    if callback == "DropoutScheduler":
        return f"p = {max(module.drops.rates):g} in {len(module.drops.rates)} calls"
    if callback == "DropoutInjection":
        zeros, entries = module.dropped.tolist()
        return f"{zeros / entries:.2f} of {entries:g}"
    return f"{max(module.changes):.2g}"


@every_model
def test_all_together(name, tmp_path, record_property, capsys, monkeypatch):
    model = MODELS[name]
    module, trainer = fit(model, TOGETHER, together(model))
    check_checkpoint(model, module, trainer, tmp_path / "model.ckpt")
    record_property("measured", f"{max(module.changes):.2g}")
    narrow, wide = summaries(trainer, capsys, monkeypatch)
    assert max(map(len, narrow.splitlines())) <= 80
    labels = {"acts", "on", "setting", "where", "Acts", "Setting", "Where", "Callback"}
    assert sorted(w for w in words(narrow) if w not in labels) == sorted(w for w in words(wide) if w not in labels)


@every_model
def test_all_inner_modules(name):
    model = MODELS[name]
    module, _ = fit(model, FREE, [ActivityPenalty(1e-5, modules=model.inner), DropoutInjection(0.01, after=model.inner)])
    assert max(module.changes) > 0


def summaries(trainer, capsys, monkeypatch):
    """Return what is printed about a fit on a narrow console, and on one that is wide enough for everything."""
    texts = []
    for columns in (80, 2000):
        set_width(monkeypatch, columns)
        capsys.readouterr()
        lightning_reg.summary(trainer)
        texts.append("\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()))
    return texts


@every_model
def test_predictions_are_sampled(name, record_property):
    """All dropout of training runs in predictions too, at its own rate. Nothing else changes."""
    model = MODELS[name]
    if not model.drops:
        with pytest.raises(ValueError, match=r"^MonteCarloDropout: the model has no dropout.*attributes="):
            predict(model, model.build(), model.batch(), [MonteCarloDropout(samples=3)])
        record_property("measured", "clear error")
        return
    seed(0)
    module, batch = model.build(), model.batch()
    in_training = rates_in_training(model)
    assert any(in_training)
    before, state = traces(module), {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with Drops() as drops:
        sampled = predict(model, module, batch, [MonteCarloDropout(samples=3)])
    assert drops.rates == 3 * in_training
    assert traces(module) == before
    assert_close(module.state_dict(), state, rtol=0.0, atol=0.0)
    assert sampled.shape[0] == 3
    spread = float(sampled.std(dim=0).mean() / sampled.std())
    record_property("measured", f"{spread:.2g}")
    assert spread > 0.01
    seed(0)
    with torch.no_grad():
        alone = model.build().eval().predict_step(batch, 0)
    assert_close(predict(model, module, batch, []), alone, rtol=0.0, atol=0.0)


def predict(model, module, batch, callbacks):
    """Return the predictions for one batch."""
    trainer = model.lightning.Trainer(**QUIET, callbacks=callbacks)
    (prediction,) = trainer.predict(module, DataLoader([batch], batch_size=None))
    return prediction


WITH_OWN_RATES = {name: model for name, model in MODELS.items() if model.attributes}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in WITH_OWN_RATES])
def test_rates_in_attributes_are_suggested(name):
    """A class that keeps its rate in an attribute of its own is not known. The error says what to write."""
    model = MODELS[name]
    with pytest.raises(ValueError, match=r"^DropoutScheduler: the model has no dropout") as raised:
        fit(model, CASES["DropoutScheduler"], [DropoutScheduler(0.4)])
    assert f"attributes={model.attributes!r}" in str(raised.value)


# Negative controls ---------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("timm ViT")
@pytest.mark.parametrize("callback", [name for name, case in CASES.items() if case.changes_training])
def test_missing_callback_is_noticed(callback):
    with pytest.raises(AssertionError):
        fit(MODELS["timm ViT"], CASES[callback], [])


@pytest.mark.xdist_group("timm ViT")
@pytest.mark.parametrize("callback", [name for name, case in CASES.items() if case.strength is not None])
def test_wrong_strength_is_noticed(callback):
    model, case = MODELS["timm ViT"], CASES[callback]
    with pytest.raises(AssertionError):
        fit(model, case, [case.active(2 * case.strength, model)])


@pytest.mark.xdist_group("transformers GPT-2")
@pytest.mark.parametrize("callback", ["GroupLassoPenalty", "MaxNorm", "GradientCentralization"])
def test_rows_in_place_of_columns_are_noticed(callback):
    model, case = replace(MODELS["transformers GPT-2"], columns=""), CASES[callback]
    with pytest.raises(AssertionError):
        fit(model, case, [case.active(case.strength, model)])


@pytest.mark.xdist_group("timm ViT")
def test_a_missing_weight_is_noticed():
    model, case = replace(MODELS["timm ViT"], weights=r".*\.(qkv|proj|fc[12])\.weight"), CASES["L2Penalty"]
    with pytest.raises(AssertionError):
        fit(model, case, [case.active(case.strength, model)])
