"""Penalties and SparseAdam, which takes no dense gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, same
from laws import changed
from table import ROWS
from torch import nn

from lightning_reg import Linear, Penalty, SoftThresholding, WeightDecay


class Sparse(Classifier):
    """Trains an embedding with SparseAdam, alone or beside a network with SGD."""

    def __init__(self, alone=True):
        super().__init__()
        table = torch.linspace(-1.0, 1.0, 640).view(10, 64)
        self.embedding, self.alone = nn.Embedding.from_pretrained(table, freeze=False, sparse=True), alone
        self.net.requires_grad_(not alone)
        self.automatic_optimization = alone

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = super().training_step((images + self.embedding(labels), labels), batch_idx)
        if not self.automatic_optimization:
            self.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        sparse = torch.optim.SparseAdam([self.embedding.weight], lr=0.01)
        return sparse if self.alone else [sparse, torch.optim.SGD(self.net.parameters(), lr=0.05)]


PENALTIES = [name for name, row in ROWS.items() if isinstance(row.active(), Penalty)]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_with_sparse_adam(name, alone):
    """They say at fit start what to do, and each of the three ways works."""
    penalty = ROWS[name].active()
    message = (
        rf"^{name} adds a dense gradient to embedding.weight, but SparseAdam takes only sparse gradients: exclude "
        r"these parameters, as in params=\[…, '!embedding.weight'\], use another optimizer, or .* WeightDecay or SoftThr.*$"
    )
    with pytest.raises(ValueError, match=message):
        fit([penalty], Sparse(alone), max_epochs=1)
    excluding = changed(penalty, params=["weights", "!embedding.weight"])
    if not alone:
        assert same(fit([excluding], Sparse(alone), max_epochs=1), fit(model=Sparse(alone), max_epochs=1)) is False
    zero = dict.fromkeys(type(penalty).valid_ranges, 0.0)
    assert same(fit([changed(penalty, **zero)], Sparse(alone), max_epochs=1), fit(model=Sparse(alone), max_epochs=1))
    with pytest.raises(ValueError, match="SparseAdam takes only"):
        fit([changed(penalty, **dict.fromkeys(zero, Linear(0.0, 0.1)))], Sparse(alone), max_epochs=1)


@pytest.mark.parametrize("callback", [WeightDecay(0.5), SoftThresholding(0.5)])
def test_what_to_use_with_sparse_adam(callback):
    trained, plain = fit([callback], Sparse(), max_epochs=1), fit(model=Sparse(), max_epochs=1)
    assert trained.embedding.weight.abs().sum() < plain.embedding.weight.abs().sum()
