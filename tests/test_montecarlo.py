"""Dropout that stays on in predict."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import QUIET, Classifier, Memory, fit, loader, same
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn

from lightning_reg import DropoutInjection, DropoutScheduler, Linear, MonteCarloDropout
from lightning_reg.functional import sample_predictions


class Predicts(Classifier):
    """The model with batch normalization. It records which modules are in training mode while it predicts."""

    def __init__(self, p=0.5):
        super().__init__()
        self.net[1] = nn.BatchNorm1d(16)
        self.net[3].p = p

    def predict_step(self, batch, batch_idx):
        self.modes = {name: module.training for name, module in self.named_modules() if module.training}
        return self.net(batch[0])


def predict(callbacks, model=None, **kwargs):
    """Return the predictions of each batch of digits, and the model."""
    model = model or Predicts()
    torch.manual_seed(0)
    trainer = Trainer(**{**QUIET, **kwargs}, callbacks=callbacks)
    return trainer.predict(model, loader()), model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_samples_are_stacked_and_differ():
    model = Predicts().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampled, _ = predict([MonteCarloDropout(samples=5)], model)
    assert [batch.shape for batch in sampled] == [(5, 16, 10)] * 4
    assert all(not torch.equal(batch[0], batch[1]) for batch in sampled)
    assert model.modes == {"net.3": True}  # not batch normalization
    assert not any(modes(model).values())
    assert "predict_step" not in vars(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_single_sample_is_not_stacked():
    (first, *_), _ = predict([MonteCarloDropout()])
    (plain, *_), _ = predict([])
    assert first.shape == plain.shape == (16, 10)
    assert not torch.equal(first, plain)
    assert torch.equal(plain, predict([])[0][0])


def test_mean_and_variance_of_samples():
    """The model is linear after the dropout, so the mean is the plain prediction, within five standard errors."""
    (sampled, *_), _ = predict([MonteCarloDropout(samples=4000)])
    (plain, *_), model = predict([])
    error = sampled.std(0) / math.sqrt(4000)
    assert ((sampled.mean(0) - plain).abs() < 5 * error + 1e-6).all()
    hidden = model.eval().net[:3](next(iter(loader()))[0])
    variance = hidden.square() @ model.net[4].weight.square().T  # p / (1 - p) is 1
    assert ((sampled.var(0) - variance).abs() < 0.2 * variance + 1e-6).all()
    assert not ((sampled.var(0) - 2 * variance).abs() < 0.2 * variance + 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
def test_module_modes_are_restored(training):
    model = Predicts().train(training)
    before = modes(model)
    predict([MonteCarloDropout(samples=2)], model)
    assert modes(model) == before


def test_exception_leaves_no_trace():
    class Fails(Predicts):
        def predict_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    model = Fails().eval()
    with pytest.raises(RuntimeError, match="stop"):
        predict([MonteCarloDropout(samples=2), DropoutInjection(0.5, after="ReLU")], model)
    assert not any(modes(model).values())
    assert "predict_step" not in vars(model)
    assert not model.net[2]._forward_hooks
    assert type(model.net[2]) is nn.ReLU


class Structured(Predicts):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self.net(batch[0]), "parts": (batch[1], [batch_idx, None])}


def test_nested_predictions_are_stacked():
    (first, *_), _ = predict([MonteCarloDropout(samples=3)], Structured())
    assert first["logits"].shape == (3, 16, 10)
    assert first["parts"][0].shape == (3, 16)
    assert first["parts"][1] == [[0, 0, 0], None]


def test_prediction_writer_gets_stacked_predictions():
    written = []

    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            written.append(prediction.shape)

    predict([MonteCarloDropout(samples=3), Writer("batch")])
    assert written == [(3, 16, 10)] * 4


@pytest.mark.parametrize("p", [0.5, Linear(0.0, 1.0)])
def test_injected_dropout_predicts_with_final_rate(p):
    class PredictsOnes(Predicts):
        def predict_step(self, batch, batch_idx):
            self.evaluated = not self.net[2].training
            return self.net[2](torch.ones(100, 100))

    model = PredictsOnes(0.0)
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[DropoutInjection(p, after="ReLU"), MonteCarloDropout(samples=2)])
    trainer.fit(model, loader())
    assert torch.equal(model.eval().net[2](torch.ones(10)), torch.ones(10))
    sampled = trainer.predict(model, loader())[0]
    rate = 0.5 if p == 0.5 else 7 / 8  # the progress at the last of eight batches
    assert abs((sampled == 0).float().mean() - rate) < 5 * (rate * (1 - rate) / 20000) ** 0.5
    assert model.evaluated
    assert not model.net[2]._forward_hooks


def test_fit_after_predict():
    """Predict runs in inference mode, whose tensors cannot be changed outside of it."""
    model = Predicts()
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[DropoutInjection(0.5, after="ReLU"), MonteCarloDropout(samples=2)])
    trainer.predict(model, loader())
    trainer.fit(model.train(), loader())


def test_fit_is_unchanged():
    callbacks = [DropoutInjection(0.2, after="ReLU"), DropoutScheduler(0.3)]
    assert same(fit([*callbacks, MonteCarloDropout(samples=4)]), fit(callbacks))


def test_compiled_model_drops():
    torch._dynamo.reset()
    model = Predicts()
    model.net = torch.compile(model.net, backend="eager")
    plain, _ = predict([], model)
    sampled, _ = predict([MonteCarloDropout(samples=2), DropoutInjection(0.5, after="ReLU")], model)
    assert not torch.equal(sampled[0][0], sampled[0][1])
    again, _ = predict([], model)
    assert torch.equal(plain[0], again[0])


def test_predict_with_compiled_lightning_module():
    torch._dynamo.reset()
    model = Predicts()
    compiled = torch.compile(model, backend="eager")
    trainer = Trainer(**QUIET, callbacks=[MonteCarloDropout(samples=3)])
    assert trainer.predict(compiled, loader())[0].shape == (3, 16, 10)
    assert model.predict_step.__name__ != "sampled"


def test_zero_rates_warn():
    with pytest.warns(
        UserWarning, match="MonteCarloDropout: all dropout rates are 0, so all predictions of a batch will be equal: Dropout"
    ):
        predict([MonteCarloDropout(samples=2)], Predicts(0.0))


class Iterates(Predicts):
    def predict_step(self, dataloader_iter):
        return None


class WithoutDropout(LightningModule):
    def forward(self, batch):
        return batch[0]


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MonteCarloDropout(samples=0), "samples must be an integer ≥ 1, got 0"),
        (lambda: MonteCarloDropout(samples=2.0), "samples must be an integer ≥ 1, got 2.0"),
        (
            lambda: predict([MonteCarloDropout(samples=2)], Iterates()),
            r"predict_step\(dataloader_iter\) fetches its batches itself",
        ),
        (
            lambda: predict([MonteCarloDropout(samples=2)], WithoutDropout()),
            "the model has no dropout; .* pass DropoutInjection",
        ),
        (
            lambda: predict([MonteCarloDropout(samples=2), DropoutInjection(Linear(0.0, 0.5), after="ReLU")]),
            r"the rate of DropoutInjection-ReLU is unknown, because no fit has used its schedule p=Linear\(0.0, 0.5\) yet",
        ),
    ],
    ids=["no samples", "fractional samples", "iterator of batches", "no dropout", "unknown rate"],
)
def test_unsupported_use_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sample_predictions():
    numbers = iter(range(6))
    assert sample_predictions(lambda: (torch.tensor(next(numbers)), "x"), 3)[0].tolist() == [0, 1, 2]


def test_transformer_fast_path_is_disabled():
    """In eval mode, torch takes a fast path that does not call the children of an encoder layer."""

    class Encodes(LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), 2)

        def predict_step(self, batch, batch_idx):
            return self.encoder(batch[0].view(-1, 8, 8))

    before = torch.backends.mha.get_fastpath_enabled()
    trainer = Trainer(**QUIET, callbacks=[MonteCarloDropout(samples=2)])
    first, second = trainer.predict(Encodes(), loader(16))[0]
    assert not torch.equal(first, second)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_fit_with_nothing_to_log_logs_nothing():
    """Not even an empty row in a CSV file."""
    logger = Memory()
    fit([MonteCarloDropout(samples=2)], logger=logger, log_every_n_steps=1)
    assert logger.steps == {}
