"""A small transformer reads Python's own documentation: weight decay, adaptive clipping, and one corrupted batch.

The model learns the beginnings of 78 topics of ``pydoc_data.topics``, and overfits within a few epochs. The first table
compares weight decay, adaptive gradient clipping, and both with the plain model, on five random splits of the topics. The
second shows what one corrupted batch does, with and without ``NonFiniteGradientGuard``. It takes two to three minutes.

    python examples/language_transformer.py
    python examples/language_transformer.py --fsdp

With ``--fsdp``, two processes on the CPU train the same model with sharded parameters (FSDP2), with all three callbacks, and
with the corrupted batch in one of them. A single process trains it too, and both losses are printed. It takes half a minute.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import warnings
from collections import Counter
from copy import deepcopy
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import rich
import torch
from digits import silence_notices
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_reg import AdaptiveGradientClipping, NonFiniteGradientGuard, WeightDecay
from lightning_reg.tuning import compare

if TYPE_CHECKING:
    from collections.abc import Sequence

Batch: TypeAlias = "tuple[Tensor, Tensor]"

CONTEXT, BATCH, BAD_BATCH = 64, 32, 10
TOLERANCE = 1e-4  # between sharded and unsharded training
OUTPUT = Path("runs/language_transformer")


@cache
def corpus(characters: int = 1000, frequent: int = 400) -> tuple[list[list[int]], int]:
    """Return the tokens of the beginning of each topic, and the number of different tokens.

    Some topics repeat paragraphs of others. Only the shortest topic keeps them, or else validation would test what training
    has shown. Frequent words are tokens, and other words are spelled.
    """
    seen: set[str] = set()
    texts = []
    for text in sorted(topics.values(), key=len):
        paragraphs = [part for part in text.split("\n\n") if part not in seen]
        seen.update(paragraphs)
        texts.append("\n\n".join(paragraphs)[:characters])
    words = [re.findall(r" ?[A-Za-z]+|\s+|.", text) for text in texts]
    common = [word for word, _ in Counter(chain(*words)).most_common(frequent) if len(word) > 1]
    numbers = {token: number for number, token in enumerate([*sorted(set("".join(texts))), *common])}
    tokens = [[numbers[token] for word in text for token in ([word] if word in numbers else word)] for text in words]
    return [text for text in tokens if len(text) > CONTEXT], len(numbers)


class Loader(DataLoader[Any]):
    """Training batches, of which one may be corrupted or left out.

    Args:
        bad: ``"corrupt"`` gives a window of the batch an infinite weight, ``"leave out"`` skips the batch.
        **options: What a ``DataLoader`` takes.
    """

    def __init__(self, bad: str, **options: Any) -> None:
        self.bad, self.count = bad, 0
        super().__init__(**options)

    def __iter__(self) -> Any:
        for windows, weights in super().__iter__():
            self.count += 1
            if self.bad and self.count == BAD_BATCH:
                if self.bad == "leave out":
                    continue
                weights[0] = math.inf  # such as 1 / count with a count of 0
            yield windows, weights


class Topics(LightningDataModule):
    """Windows of tokens, each with a weight of 1. One topic in six is for validation.

    Args:
        split: The number of the random split.
        bad: What happens to one training batch; see ``Loader``.
    """

    def __init__(self, split: int, bad: str = "") -> None:
        super().__init__()
        self.split, self.bad = split, bad
        texts, _ = corpus()
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(split)).tolist()
        parts = [texts[i] for i in order[: len(order) // 6]], [texts[i] for i in order[len(order) // 6 :]]
        self.validation, self.training = map(windows, parts)

    def train_dataloader(self) -> Loader:
        """Return this process's part of each batch of training windows."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler: DistributedSampler[Batch] = DistributedSampler(self.training, ranks, rank, seed=self.split)
        bad = self.bad if rank == ranks - 1 else ""
        return Loader(bad, dataset=self.training, batch_size=BATCH // ranks, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return all validation windows."""
        return DataLoader(self.validation, batch_size=128)


def windows(texts: list[list[int]]) -> TensorDataset:
    """Return texts as windows of ``CONTEXT`` tokens and the next one, and a weight for each."""
    cut = [text[i : i + CONTEXT + 1] for text in texts for i in range(0, len(text) - CONTEXT, CONTEXT)]
    return TensorDataset(torch.tensor(cut), torch.ones(len(cut)))


class LanguageModel(LightningModule):
    """A transformer that predicts the next token; nothing in it knows of regularization.

    Args:
        width: Size of the vectors.
        layers: Number of layers.
        lr: The learning rate of Adam.
    """

    def __init__(self, width: int = 64, layers: int = 2, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr, vocabulary = lr, corpus()[1]
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        block: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, **block) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def configure_model(self) -> None:
        """Shard the parameters if the strategy is a ``ModelParallelStrategy``."""
        if self.device_mesh is not None:
            for layer in (self.tokens, self.positions, *self.blocks, self.head):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position."""
        hidden = self.tokens(tokens) + self.positions(torch.arange(CONTEXT, device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return cast("Tensor", self.head(hidden))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._loss(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure a batch."""
        self.log("val/loss", self._loss(batch), batch_size=len(batch[0]))

    def _loss(self, batch: Batch) -> Tensor:
        text, weights = batch
        losses = cross_entropy(self(text[:, :-1]).transpose(1, 2), text[:, 1:], reduction="none")
        return (weights * losses.mean(1)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, without weight decay."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# A weight forgets in 1/(η·λ) = 1/(0.003 · 3) ≈ 110 steps, which is half of the training, because the model sees the same little
# text again and again. With 0.1, which is usual for large models that see each text once, it would be 3,300 steps.
DECAY = WeightDecay(3.0)
CLIPPING = AdaptiveGradientClipping(0.1, params=["all", "!head.*"])  # 0.1 for small batches, and not for the last layer
CANDIDATES: dict[str, list[Callback]] = {
    "plain": [],
    "decay": [DECAY],
    "clipping": [CLIPPING],
    "both": [DECAY, CLIPPING],
}


def train(callbacks: Sequence[Callback], bad: str, epochs: int, **options: Any) -> Trainer:
    """Train with the first split, and return the Trainer."""
    seed_everything(0, verbose=False)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    options |= dict.fromkeys(off, False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=deepcopy([*callbacks]), **options)
    trainer.fit(LanguageModel(), Topics(0, bad))
    return trainer


def corrupted(epochs: int) -> Table:
    """Train with and without the corrupted batch and the guard, and return a table."""
    table = Table(title=f"One batch corrupted, one split, {epochs} epochs")
    for column in ("Training data", "Callback", "val/loss"):
        table.add_column(column, justify="right" if column == "val/loss" else "left")
    weights = {}
    for data, bad, guards in (
        ("all batches good", "", []),
        ("one batch corrupted", "corrupt", []),
        ("one batch corrupted", "corrupt", [NonFiniteGradientGuard()]),
        ("that batch left out", "leave out", []),
    ):
        trainer, name = train(guards, bad, epochs), "NonFiniteGradientGuard" if guards else ""
        (found,) = trainer.validate(trainer.lightning_module, datamodule=Topics(0), verbose=False)
        table.add_row(data, name, f"{found['val/loss']:.6f}")
        weights[bad, name] = nn.utils.parameters_to_vector(trainer.lightning_module.parameters())
    same = torch.equal(weights["corrupt", "NonFiniteGradientGuard"], weights["leave out", ""])
    table.caption = f"The weights of the last two runs are {'equal, bit for bit' if same else 'different'}"
    return table


def sharded(epochs: int) -> None:
    """Train in one process, then in two that share the parameters, and print both losses.

    Lightning starts the second process with the command of this one, so this function runs in both.

    Raises:
        RuntimeError: If the losses differ.
    """
    callbacks = [DECAY, CLIPPING, NonFiniteGradientGuard()]
    runs = {}
    if is_first := "LOCAL_RANK" not in os.environ:
        runs["one process"] = train(callbacks, "corrupt", epochs)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    runs["two processes, FSDP2"] = train(callbacks, "corrupt", epochs, **options)
    if not is_first:
        return
    table = Table("Trained by", "val/loss", "Parameters in a process", title=f"The same training, {epochs} epochs")
    losses = {name: float(trainer.callback_metrics["val/loss"]) for name, trainer in runs.items()}
    for name, trainer in runs.items():
        held = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.optimizers[0].param_groups[0]["params"]]
        table.add_row(name, f"{losses[name]:.6f}", f"{sum(p.numel() for p in held):,}")
    one, two = losses.values()
    table.caption = f"Difference {abs(one - two):.1e}, tolerance {TOLERANCE}"
    rich.print(table)
    if not abs(one - two) <= TOLERANCE:
        raise RuntimeError(f"training with shards differs: {two}, but {one} in one process")


def silence() -> None:
    """Turn off notices, and two warnings: of the guard, since the tables show the same, and of torch about views."""
    silence_notices()
    warnings.filterwarnings("ignore", message="NonFiniteGradientGuard")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def main() -> None:
    """Compare, or train with shards."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=14, help="epochs of each run (default: 14)")
    parser.add_argument("--repeats", type=int, default=5, help="splits (default: 5)")
    parser.add_argument("--fsdp", action="store_true", help="train with sharded parameters in two processes")
    given = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    if given.fsdp:
        sharded(min(given.epochs, 4))
        return
    trainer = {"max_epochs": given.epochs, "accelerator": "cpu"}
    result = compare(LanguageModel, Topics, CANDIDATES, metric="val/loss", repeats=given.repeats, trainer=trainer)
    rich.print(result.table(), corrupted(min(given.epochs, 4)))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure = result.figure()
    figure.suptitle("A small transformer learns Python's documentation: weight decay and adaptive clipping")
    figure.savefig(OUTPUT / "language_transformer.png", dpi=110)
    print(f"Figure: {OUTPUT / 'language_transformer.png'}")


if __name__ == "__main__":
    main()
