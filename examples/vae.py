"""A variational autoencoder of handwritten digits: what an L1 penalty on its decoder does.

The KL term of a VAE is part of its own loss. L1 on the weights of the decoder comes from a callback: as a penalty, and as soft
thresholding, which sets weights to exactly zero. This trains on 1,000 images of MNIST, on eight random splits per candidate.
It takes about two minutes, prints two tables, and draws reconstructions.

    python examples/vae.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import rich
import torch
from digits import silence_notices
from image_cnn import Images
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_reg import L1Penalty, SoftThresholding, sparsity
from lightning_reg.tuning import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT = Path("runs/vae")
LATENT, HIDDEN, PIXELS = 8, 256, 784
SHOWN = 12
DECODER = "weights:decoder.*"
STRENGTH = 0.01  # the loss is a sum over pixels, about a hundred times the usual mean, and so is the strength


class Vae(LightningModule):
    """An encoder and a decoder with one hidden layer each; nothing in it knows of regularization.

    The loss is the negative evidence lower bound of an image in nats: cross-entropy of the pixels, and the Kullback-Leibler
    divergence of the code from a standard normal distribution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def forward(self, images: Tensor) -> Tensor:
        """Return the reconstruction of images from the means of their codes."""
        mean, _ = self.encoder(images).chunk(2, dim=1)
        pixels: Tensor = self.decoder(mean).sigmoid()
        return pixels

    def negative_elbo(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the mean over images of the cross-entropy of their pixels and the divergence of their codes."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        logits = self.decoder(mean + noise * (log_variance / 2).exp())
        entropy = binary_cross_entropy_with_logits(logits, images.flatten(1), reduction="none").sum(1)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        loss: Tensor = (entropy + divergence).mean()
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.negative_elbo(batch[0], torch.randn(len(batch[0]), LATENT, device=self.device))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure the negative evidence lower bound with the same noise each time."""
        noise = torch.randn(len(batch[0]), LATENT, generator=torch.Generator().manual_seed(0))
        self.log("val/loss", self.negative_elbo(batch[0], noise.to(self.device)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def candidates() -> dict[str, list[Callback]]:
    """Return the callbacks to compare. Soft thresholding moves a weight by lr·λ in a step, as L1 alone would with SGD."""
    return {
        "plain": [],
        "L1 penalty": [L1Penalty(STRENGTH, params=DECODER)],
        "soft threshold": [SoftThresholding(STRENGTH, params=DECODER)],
        "strong L1": [L1Penalty(10 * STRENGTH, params=DECODER)],
    }


def train(callbacks: Sequence[Callback], epochs: int) -> Vae:
    """Train on the first split, as ``compare`` does, and return the model."""
    seed_everything(0, verbose=False)
    model = Vae()
    off: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks], limit_val_batches=0, **off).fit(model, Images(0))
    return model.eval()


def small(model: Vae) -> float:
    """Return the fraction of the decoder's weights that are smaller than 0.001."""
    weights = torch.cat([layer.weight.flatten() for layer in model.decoder if isinstance(layer, nn.Linear)])
    return float((weights.abs() < 1e-3).double().mean())


def decoders(models: dict[str, Vae]) -> Table:
    """Return a table of what became of the decoder's weights."""
    table = Table(
        "Candidate", "Decoder's weights below 0.001", "exactly 0", title="First split", box=SIMPLE_HEAD, show_edge=False
    )
    for name, model in models.items():
        table.add_row(name, f"{small(model):.0%}", f"{sparsity(model, params=DECODER).fraction:.0%}")
    return table


@torch.no_grad()
def draw(models: dict[str, Vae], path: Path) -> None:
    """Draw images that were held out above the reconstructions of each candidate, and save the figure."""
    held_out = Images(0).validation
    images = torch.stack([held_out[index][0] for index in range(SHOWN)])
    rows = {"held out": images, **{name: model(images) for name, model in models.items()}}
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 0.72 * len(rows) + 0.4), layout="constrained")
    for axis, (label, pixels) in zip(axes, rows.items(), strict=True):
        axis.imshow(pixels.view(-1, 28, 28).permute(1, 0, 2).reshape(28, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle("What each autoencoder makes of digits that it never saw", fontsize=12)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, print the tables, and draw the reconstructions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (default: 40)")
    parser.add_argument("--repeats", type=int, default=8, help="splits (default: 8)")
    given = parser.parse_args()
    silence_notices()
    torch.set_num_threads(1)
    trainer = {"max_epochs": given.epochs, "accelerator": "cpu"}
    result = compare(Vae, Images, candidates(), metric="val/loss", repeats=given.repeats, trainer=trainer)
    models = {name: train(callbacks, given.epochs) for name, callbacks in candidates().items()}
    rich.print(result.table(), decoders(models))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw(models, OUTPUT / "vae.png")
    print(f"Figure: {OUTPUT / 'vae.png'}")


if __name__ == "__main__":
    main()
