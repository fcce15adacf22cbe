"""Every callback under ``Trainer(deterministic=True)``, which refuses operations without a deterministic form."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, same
from table import every_callback, everything, model
from torch import Tensor

from lightning_reg import PeakGradientDropping
from lightning_reg.custom import GradientProcessing, Phase


@pytest.fixture(autouse=True)
def _restores_mode(monkeypatch):
    """Restore what Lightning sets in the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    yield
    torch.use_deterministic_algorithms(False)


class Puts(GradientProcessing):
    """The naive version: it writes by an operation that has no deterministic form."""

    phase = Phase.VALUE_CLIPPING

    def gradients(self, params, optimizer, step):
        for p in params:
            p.grad.put_(p.grad.abs().flatten().topk(1).indices, torch.zeros(1))


@every_callback
def test_training_is_the_same(row):
    ordinary = fit([row.active()], model(row))
    assert same(fit([row.active()], model(row), deterministic=True), ordinary)


def test_training_with_all_callbacks_is_the_same():
    ordinary = fit(everything())
    assert same(fit(everything(), deterministic=True), ordinary)


def test_an_operation_without_a_deterministic_form_raises():
    callback = Puts(params="all", name=None)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        fit([callback], deterministic=True)


@pytest.mark.parametrize("k", [1, 3])
def test_dropped_peaks_are_the_same_with_ties(k):
    """All columns of the first weight have the same gradients."""

    class Tied(Classifier):
        def training_step(self, batch, batch_idx) -> Tensor:
            images, labels = batch
            return super().training_step((images.mean(1, keepdim=True).expand_as(images), labels), batch_idx)

    ordinary = fit([PeakGradientDropping(k, params="net.0.weight")], Tied())
    assert same(fit([PeakGradientDropping(k, params="net.0.weight")], Tied(), deterministic=True), ordinary)
