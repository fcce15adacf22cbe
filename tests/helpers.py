"""A small model on real data, and one way to train it: what most tests start from."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import Callback

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""How near two ranks are to one process, which sums in another order."""

UNITS = {
    nn.Linear(5, 3): lambda w: [w[i] for i in range(3)],
    nn.Conv2d(4, 6, 3, groups=2): lambda w: [w[i] for i in range(6)],
    nn.ConvTranspose2d(4, 6, 3): lambda w: [w[:, i] for i in range(6)],
    nn.ConvTranspose1d(4, 6, 3, groups=2): lambda w: [w[2 * g : 2 * g + 2, i] for g in range(2) for i in range(3)],
    nn.Embedding(7, 4): lambda w: [w[i] for i in range(7)],
}
"""Layers, and their output units written out."""


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


@functools.cache  # reading them takes longer than most models here train
def _digits() -> tuple[Any, Any]:
    return load_digits(return_X_y=True)


def digits(samples: int = 64) -> tuple[Tensor, Tensor]:
    """Return the first of scikit-learn's digits, in [0, 1], and their labels."""
    images, labels = _digits()
    return torch.tensor(images[:samples], dtype=torch.float32) / 16, torch.tensor(labels[:samples])


def loader(samples: int = 64, batch_size: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of digits in a fixed order."""
    return DataLoader(TensorDataset(*digits(samples)), batch_size=batch_size)


def seed(value: int) -> None:
    """Seed the generators that draw in tests.

    As ``torch.manual_seed`` does, which also keeps a stack trace for each kind of device that is absent, and takes longer for
    these than a small model for its step.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


class Classifier(LightningModule):
    """A small perceptron with normalization and dropout, trained by SGD with momentum from a fixed start.

    The global generator is seeded before each batch, so that dropout draws the same wherever a run begins.
    """

    def __init__(self, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed(self.trainer.fit_loop.total_batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch[:2]
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Gan(Classifier):
    """Two networks with an optimizer each, in manual optimization, with a loss that forbids changes in place.

    Args:
        stepping: The optimizers that step.
    """

    def __init__(self, stepping: Sequence[int] = (0, 1), lr: float = 0.01, **options: float) -> None:
        super().__init__(lr=lr, **options)
        self.automatic_optimization = False
        self.stepping = stepping

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for index in self.stepping:
            optimizers[index].zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx).exp())
            optimizers[index].step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[i].parameters(), lr=self.lr, weight_decay=self.weight_decay) for i in (0, 4)]


class Fused(Classifier):
    """The model with an optimizer that unscales gradients within its step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), fused=True)


def fit(
    callbacks: Sequence[Callback] = (),
    model: LightningModule | None = None,
    data: DataLoader[Any] | None = None,
    max_epochs: int = 2,
    **trainer: Any,
) -> LightningModule:
    """Train on the CPU, in silence, and return the model."""
    model = model or Classifier()
    data = loader() if data is None else data
    Trainer(**{**QUIET, "max_epochs": max_epochs, **trainer, "callbacks": list(callbacks)}).fit(model, data)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have bit-identical state."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and identical(mine, theirs)


def identical(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of tensors, which must have the same names, are bit-identical."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def distance(one: nn.Module, other: nn.Module) -> Tensor:
    """Return how far apart the weights of two models are."""
    mine, theirs = weights(one), weights(other)
    return torch.stack([(mine[name].float() - theirs[name].float()).norm() for name in mine]).norm()


def vars_of(callback: Callback) -> dict[str, Any]:
    """Return the arguments of a callback, except for its name."""
    return {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters if name != "name"}


def parameter(values: Any, grad: Any = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter, with a gradient if one is given."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return p
