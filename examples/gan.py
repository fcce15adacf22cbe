"""A Wasserstein GAN draws digits: weight clipping as its authors use it, and what else may tame the critic.

The critic of a Wasserstein GAN must not be steep: its Lipschitz constant has to be bounded. The original bounds each weight by
0.01, and its authors call that "a clearly terrible way". This trains the same GAN, in manual optimization, on scikit-learn's
digits of 8 by 8 pixels with weight clipping, without a bound, and with four other ways. Five random splits, six candidates: it
takes about two and a half minutes, prints a table, and draws digits of each candidate beside real ones.

    python examples/gan.py
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import matplotlib.pyplot as plt
import rich
import torch
from digits import silence_notices
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.linalg import matrix_norm
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import GradientNormClipping, MaxNorm, OrthogonalityPenalty, WeightClipping
from lightning_reg.tuning import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_reg.tuning import Comparison

OUTPUT = Path("runs/gan")
NOISE = 16
COLUMNS = 16


class Digits(LightningDataModule):
    """1797 images of 8 by 8 pixels, scaled to [-1, 1]. A fifth is held out.

    Args:
        split: The number of the random split.
    """

    def __init__(self, split: int) -> None:
        super().__init__()
        images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(split))]
        self.held_out, self.training = images[: len(images) // 5], images[len(images) // 5 :]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, shuffled."""
        return DataLoader(TensorDataset(self.training), 64, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out images in one batch."""
        return DataLoader(TensorDataset(self.held_out), len(self.held_out))


class Gan(LightningModule):
    """A generator and a Wasserstein critic; nothing in it knows of regularization.

    Args:
        lr: The learning rate of RMSprop, for both.
        critic_steps: Steps of the critic for each step of the generator.
    """

    def __init__(self, lr: float = 1e-3, critic_steps: int = 5) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.critic_steps = lr, critic_steps
        self.generator = nn.Sequential(perceptron(NOISE, 128, 128, 64), nn.Tanh())
        self.critic = perceptron(64, 128, 128, 128, 1)

    def forward(self, noise: Tensor) -> Tensor:
        """Return generated images."""
        return cast("Tensor", self.generator(noise))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Train the critic, and in every fifth batch the generator."""
        (real,) = batch
        for_generator, for_critic = cast("list[Any]", self.optimizers())
        noise = torch.randn(len(real), NOISE, device=self.device)
        self._step(for_critic, self.critic(self(noise).detach()).mean() - self.critic(real).mean())
        if batch_idx % self.critic_steps == 0:
            self._step(for_generator, -self.critic(self(noise)).mean())

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure how far as many generated images are from held-out ones. The critic plays no part in it."""
        noise = torch.randn(len(batch[0]), NOISE, generator=torch.Generator().manual_seed(0))
        self.log("val/distance", sliced_wasserstein(self(noise.to(self.device)), batch[0]))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return RMSprop for the generator and for the critic, as the authors of the Wasserstein GAN do."""
        return [torch.optim.RMSprop(net.parameters(), lr=self.lr) for net in (self.generator, self.critic)]


def perceptron(*sizes: int) -> nn.Sequential:
    """Return linear layers, with a leaky ReLU between them."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256) -> Tensor:
    """Return the mean distance of two samples of the same size along fixed random directions.

    Along one direction, the Wasserstein distance is the mean difference of the sorted values.
    """
    along = nn.functional.normalize(torch.randn(directions, a.shape[1], generator=torch.Generator().manual_seed(0)))
    return ((a @ along.T.to(a)).sort(dim=0)[0] - (b @ along.T.to(b)).sort(dim=0)[0]).abs().mean()


class SpectralNorm(Callback):
    """Give the critic's layers a largest singular value of 1, with torch's own parametrization."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Parametrize the layers, before the optimizers are made."""
        for layer in pl_module.get_submodule("critic").modules():
            if type(layer) is nn.Linear:
                parametrizations.spectral_norm(layer)


CANDIDATES: dict[str, list[Callback]] = {
    "clipping": [WeightClipping(0.01, params="critic.*")],  # with biases, as in the original
    "no bound": [],
    "grad norm": [GradientNormClipping(1.0, params="critic.*")],  # bounds each step, but no weight
    "max norm": [MaxNorm(1.0, params="weights:critic.*")],  # bounds each row, but rows may point the same way
    "orthogonal": [OrthogonalityPenalty(1.0, params="weights:critic.*")],  # pulls singular values toward 1
    "spectral": [SpectralNorm()],  # divides by the largest singular value
}


def lipschitz(model: Gan) -> float:
    """Return an upper bound of the critic's Lipschitz constant: the product of its layers' largest singular values."""
    return math.prod(float(matrix_norm(layer.weight.detach(), 2)) for layer in model.critic if isinstance(layer, nn.Linear))


def draw(result: Comparison, models: dict[str, Gan], path: Path) -> None:
    """Draw digits of each candidate below real ones, and save the figure."""
    rows = {"real": Digits(0).held_out[:COLUMNS]}
    noise = torch.randn(COLUMNS, NOISE, generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        rows[f"{name}: {fmean(run.value for run in result.runs[name]):.3f}"] = model(noise).detach()
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.5 * len(rows) + 0.5), layout="constrained")
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        strip = nn.functional.pad(images.view(-1, 8, 8), (1, 1, 0, 0), value=-1).permute(1, 0, 2).reshape(8, -1)
        axis.imshow(strip, cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle("Digits of a Wasserstein GAN, and their distance from real ones (lower is better)", fontsize=12)
    figure.savefig(path, dpi=120)


def train(callbacks: Sequence[Callback], epochs: int) -> Gan:
    """Train on the first split, as ``compare`` does, and return the model."""
    seed_everything(0, verbose=False)
    model = Gan()
    off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks], limit_val_batches=0, **off).fit(model, Digits(0))
    return model


def main() -> None:
    """Compare, print the table, and draw the digits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each run (default: 60)")
    parser.add_argument("--repeats", type=int, default=5, help="splits (default: 5)")
    given = parser.parse_args()
    silence_notices()
    torch.set_num_threads(1)
    trainer = {"max_epochs": given.epochs, "accelerator": "cpu"}
    result = compare(Gan, Digits, CANDIDATES, metric="val/distance", repeats=given.repeats, trainer=trainer)
    models = {name: train(callbacks, given.epochs) for name, callbacks in CANDIDATES.items()}
    bounds = Table("Candidate", "Critic's Lipschitz constant, at most", box=SIMPLE_HEAD)
    for name, model in models.items():
        bounds.add_row(name, f"{lipschitz(model):,.2f}")
    rich.print(result.table(), bounds)
    real = sliced_wasserstein(Digits(0).training[: len(Digits(0).held_out)], Digits(0).held_out)
    print(f"Distance of real digits from other real digits: {real:.3f}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(result, models, OUTPUT / "gan.png")
    print(f"Figure: {OUTPUT / 'gan.png'}")


if __name__ == "__main__":
    main()
