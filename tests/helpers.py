"""A small model on real data and a function to train it. Most tests use them."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
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
"""How close two ranks must be to one process, which sums in another order."""

UNITS = {
    nn.Linear(5, 3): lambda w: [w[i] for i in range(3)],
    nn.Conv2d(4, 6, 3, groups=2): lambda w: [w[i] for i in range(6)],
    nn.ConvTranspose2d(4, 6, 3): lambda w: [w[:, i] for i in range(6)],
    nn.ConvTranspose1d(4, 6, 3, groups=2): lambda w: [w[2 * g : 2 * g + 2, i] for g in range(2) for i in range(3)],
    nn.Embedding(7, 4): lambda w: [w[i] for i in range(7)],
}
"""Layers, each with a function that lists its output units."""


class Memory(Logger):
    """Keeps logged metrics in memory."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


@functools.cache  # loading takes longer than training most models here
def _digits() -> tuple[Any, Any]:
    return load_digits(return_X_y=True)


def digits(samples: int = 64) -> tuple[Tensor, Tensor]:
    """Return the first digits of scikit-learn, scaled to [0, 1], and their labels."""
    images, labels = _digits()
    return torch.tensor(images[:samples], dtype=torch.float32) / 16, torch.tensor(labels[:samples])


def loader(samples: int = 64, batch_size: int = 16) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of digits in a fixed order."""
    return DataLoader(TensorDataset(*digits(samples)), batch_size=batch_size)


def seed(value: int) -> None:
    """Seed the generators that the tests use.

    Faster than ``torch.manual_seed``, which also keeps a stack trace for each missing device type. That takes longer than a
    training step of a small model.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


class Classifier(LightningModule):
    """A small perceptron with normalization and dropout, trained by SGD with momentum from a fixed start.

    The global generator is seeded before each batch, so that dropout masks do not depend on where a run starts.

    Args:
        validates: Whether it has validation data, and a step that logs ``val/loss``.
    """

    def __init__(self, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0, validates: bool = False) -> None:
        super().__init__()
        if validates:
            self.__class__ = validating(type(self))
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


class Validates:
    """Mixin for a model on digits that validates."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch[:2]
        self.log("val/loss", cross_entropy(self.net(images), labels))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images, labels = digits(128)
        return DataLoader(TensorDataset(images[64:], labels[64:], torch.arange(64)), batch_size=16)


def validating(cls: type[LightningModule]) -> type[LightningModule]:
    """Return a class of models with validation data. Without them, Lightning would warn of a validation step."""
    return type(cls.__name__, (Validates, cls), {"__module__": cls.__module__})


class Gan(Classifier):
    """Two networks with one optimizer each, in manual optimization. The loss does not allow in-place changes.

    Args:
        stepping: The indices of the optimizers that step.
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
    """The model with a fused optimizer, which unscales gradients within its step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), fused=True)


def fit(
    callbacks: Sequence[Callback] = (),
    model: LightningModule | None = None,
    data: DataLoader[Any] | None = None,
    max_epochs: int = 2,
    **trainer: Any,
) -> LightningModule:
    """Train on the CPU without output and return the model."""
    model = model or Classifier()
    data = loader() if data is None else data
    Trainer(**{**QUIET, "max_epochs": max_epochs, **trainer, "callbacks": list(callbacks)}).fit(model, data)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models have bit-identical state."""
    first_state, second_state = first.state_dict(), second.state_dict()
    return first_state.keys() == second_state.keys() and identical(first_state, second_state)


def identical(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of tensors with the same names are bit-identical."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def distance(first: nn.Module, second: nn.Module) -> Tensor:
    """Return the distance between the weights of two models."""
    first_state, second_state = weights(first), weights(second)
    return torch.stack([(first_state[name].float() - second_state[name].float()).norm() for name in first_state]).norm()


def vars_of(callback: Callback) -> dict[str, Any]:
    """Return a callback's arguments, except for its name."""
    return {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters if name != "name"}


def parameter(values: Any, grad: Any = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a parameter, with a gradient if one is given."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return p


def traces(model: nn.Module) -> tuple[Any, ...]:
    """Return everything in a model that a callback might leave changed, except for the values of tensors."""
    inside = [(name, module) for name, module in model.named_modules() if module is not model]
    hooks = {
        (name, kind): len(hooks)
        for name, module in model.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks")
    }
    numbers = {
        (name, attribute): value
        for name, module in inside
        for attribute, value in vars(module).items()
        if isinstance(value, (bool, float))
    }
    attributes = {name: sorted(vars(module)) for name, module in inside}
    classes = {name: type(module) for name, module in model.named_modules()}
    return hooks, numbers, attributes, classes, list(model.state_dict()), [name for name, _ in model.named_buffers()]


def set_width(monkeypatch: Any, columns: int) -> None:
    """Let rich print on a console of a width; it has looked at the width once."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("rich._console", None)


def words(text: str) -> list[str]:
    """Return the words of a printed summary, without the lines of its table."""
    return re.sub(r"[│┃┏┓┗┛┡┩└┘━─┳╇┴┼├┤]", " ", text).split()


class DropPath(nn.Module):
    """Stochastic depth, like timm's class of this name."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Unfreezes(BaseFinetuning):
    """Unfreezes the first layer in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)
