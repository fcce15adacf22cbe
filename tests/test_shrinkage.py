from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit, loader, same
from torch.testing import assert_close

from lightning_reg import RandomShrinkage
from lightning_reg.functional import shrink_randomly_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shrinkage_matches_formula(dtype):
    torch.manual_seed(0)
    theta = torch.randn(40, 50).to(dtype)
    before = theta.clone()
    shrink_randomly_([theta], 0.3, torch.Generator().manual_seed(5))
    noise = torch.rand(40, 50, generator=torch.Generator().manual_seed(5))  # in float32 for every dtype
    assert_close(theta, (before - 0.3 * noise * before).to(dtype))


def test_fractions_are_uniform():
    """Mean and variance of U(0, 1) within four standard errors, which one sample in 16,000 misses."""
    theta = torch.ones(100_000, dtype=torch.float64)
    shrink_randomly_([theta], 1.0, torch.Generator().manual_seed(0))
    fractions = 1 - theta
    assert fractions.min() >= 0
    assert fractions.max() < 1
    assert abs(fractions.mean() - 1 / 2) < 4 * (1 / 12 / 100_000) ** 0.5
    assert abs(fractions.var() - 1 / 12) < 4 * (1 / 180 / 100_000) ** 0.5


class RecordsNorms(Classifier):
    """Records the norm of the weights after each step. The optimizer does nothing."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_train_start(self):
        self.norms = [self.net[0].weight.norm().item()]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.norms.append(self.net[0].weight.norm().item())

    @property
    def shrunk(self):
        return [later < earlier for earlier, later in zip(self.norms, self.norms[1:], strict=False)]


def test_shrinks_after_each_step_or_epoch():
    assert fit([RandomShrinkage(0.1)], RecordsNorms()).shrunk == [True] * 8
    assert fit([RandomShrinkage(0.1)], RecordsNorms(), accumulate_grad_batches=2).shrunk == [False, True] * 4
    # the model's own hook runs after those of the callbacks
    assert fit([RandomShrinkage(0.1, every="epoch")], RecordsNorms()).shrunk == [False, False, False, True] * 2


def test_shrinks_before_validation():
    class Validated(RecordsNorms):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.validated = self.net[0].weight.norm().item()

        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return loader()

    model = fit([RandomShrinkage(0.1, every="epoch")], Validated(), max_epochs=1, num_sanity_val_steps=0)
    assert model.validated == model.norms[-1] < model.norms[0]


def test_each_step_and_seed_draws_new_numbers():
    def ratio(**kwargs):
        start = RecordsNorms().net[0].weight
        return [fit([RandomShrinkage(0.1, **kwargs)], RecordsNorms(), max_steps=n).net[0].weight / start for n in (1, 2)]

    first, both = ratio()
    assert not torch.allclose(both, first**2)
    assert not torch.equal(ratio(seed=1)[0], first)
    assert torch.equal(ratio(seed=0)[0], first)


def test_shrinkage_does_not_use_global_generator():
    """Dropout uses the global generator, so a draw from it would change training."""

    class Unseeded(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    torch.manual_seed(3)
    unshrunk = fit([RandomShrinkage(1e-30)], Unseeded())
    torch.manual_seed(3)
    assert same(unshrunk, fit(model=Unseeded()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomShrinkage(1.5), r"RandomShrinkage: epsilon must be a number in \[0, 1\], got 1.5"),
        (lambda: RandomShrinkage(-0.1), r"RandomShrinkage: epsilon must be a number in \[0, 1\], got -0.1"),
        (lambda: RandomShrinkage(0.1, every="batch"), "RandomShrinkage: every must be 'step' or 'epoch', got 'batch'"),
        (lambda: RandomShrinkage(0.1, seed=-1), r"RandomShrinkage: seed must be an integer in \[0, 2147483648\), got -1"),
    ],
    ids=["epsilon above 1", "negative epsilon", "unknown every", "negative seed"],
)
def test_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
