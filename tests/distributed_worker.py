"""One rank of a distributed run: trains the digits model in several ways and saves what comes of each.

Started by ``test_distributed.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from digits import DigitsClassifier
from helpers import QUIET, Memory, digits
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ActivityPenalty,
    Cubic,
    DropoutInjection,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientNormClipping,
    GradientValueClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    Linear,
    OrthogonalityPenalty,
    PeakGradientDropping,
    Penalty,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    WeightClipping,
    WeightDecay,
    WeightPruning,
)

RANKS, STEPS, BATCH = 2, 6, 16


def techniques() -> list[Callback]:
    """Return all techniques at once, as strong as lets each of them matter."""
    return [
        WeightClipping(0.1),
        RandomShrinkage(0.01),
        RandomShrinkage(0.02, every="epoch", params="net.6.weight"),
        GradientNormClipping(Linear(0.5, 0.1)),
        GradientValueClipping(0.05),
        PeakGradientDropping(),
        L1Penalty(1e-3),
        L2Penalty(Linear(0.0, 1e-2)),
        ElasticNetPenalty(1e-3, 1e-2, params="net.1.weight"),
        GroupLassoPenalty(1e-3),
        OrthogonalityPenalty(1e-2),
        StartingPointPenalty(0.1),
        ActivityPenalty(1e-3, modules="ReLU"),
        WeightDecay(0.1),
        SoftThresholding(1e-3),
        GroupSoftThresholding(1e-3),
        DropoutInjection(0.2, after="ReLU"),
        DropoutScheduler(Linear(0.0, 0.3)),
    ]


class Digits(DigitsClassifier):
    """The digits model with SGD, whose dropout depends on the samples alone and not on who computes them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(hidden=32, lr=0.1)
        self.net.insert(3, nn.Dropout(0.1))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, labels, numbers = batch
        torch.manual_seed(int(numbers[0]))
        return nn.functional.cross_entropy(self(images.view(-1, 8, 8)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def batches(ranks: list[int]) -> DataLoader[tuple[Tensor, ...]]:
    """Return the batches of some ranks: one global batch for each step, divided evenly."""
    images, labels = digits(RANKS * STEPS * BATCH)
    numbers = torch.arange(len(labels)).view(STEPS, RANKS, BATCH)
    sampler = [numbers[step, rank].tolist() for step in range(STEPS) for rank in ranks]
    return DataLoader(TensorDataset(images, labels, torch.arange(len(labels))), batch_sampler=sampler)


def train(callbacks: list[Callback], model: LightningModule, ranks: list[int], **trainer: object) -> dict[str, Tensor]:
    """Train for two epochs and return the weights."""
    options = {"max_epochs": 2, "use_distributed_sampler": False, "logger": Memory(), "log_every_n_steps": 1, **trainer}
    Trainer(**{**QUIET, **options}, callbacks=callbacks).fit(model, batches(ranks))
    return {name: whole(p) for name, p in model.named_parameters()}


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


class Unseeded(RandomShrinkage):
    """The naive version: each rank draws for itself."""

    def _shrink(self, params: list[nn.Parameter], step: int) -> None:
        for p in params:
            p.mul_(1 - self.epsilon * torch.rand(p.shape, generator=self.generator))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.generator = torch.Generator().manual_seed(trainer.global_rank)


class Unused(Digits):
    """The digits model with a layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        nn.init.constant_(self.unused.weight, 0.5)


class Sharded(Digits):
    """The digits model with parameters divided among the ranks; what is outside of ``net`` stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.full((1, 1), 0.09))  # beside DTensors, one tensor that is none
        self.single = nn.Linear(4, 1, bias=False)  # one of its shards is empty

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[1], self.net[4], self.net[6], self.single):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def ddp(**kwargs: bool) -> dict[str, object]:
    """Return what makes a trainer one rank of DDP; a strategy serves one trainer only."""
    return {"strategy": DDPStrategy(process_group_backend="gloo", **kwargs), "devices": RANKS}


def sharded() -> dict[str, object]:
    """Return what makes a trainer one rank of FSDP2."""
    return {"strategy": ModelParallelStrategy(RANKS, 1), "devices": RANKS}


def failure(callbacks: list[Callback], model: LightningModule, ranks: list[int], **trainer: object) -> str:
    """Train and return the error that this comes to."""
    try:
        train(callbacks, model, ranks, **trainer)
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


class Naive(Callback):
    """What one writes first: a Python sum, added to the loss in every backward pass."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss.add_(0.05 * sum(p.square().sum() for p in pl_module.parameters() if p.ndim > 1))


def sharded_techniques() -> list[Callback]:
    """Return the techniques that act on shards."""
    return [
        L1Penalty(1e-3),
        L2Penalty(1e-2),
        LogPenalty(0.1),
        ElasticNetPenalty(1e-3, 1e-2, params="net.1.weight"),
        GroupLassoPenalty(1e-3),
        OrthogonalityPenalty(1e-2),
        StartingPointPenalty(0.1),
        ActivityPenalty(1e-3, modules="ReLU"),
        WeightDecay(0.1),
        SoftThresholding(1e-3),
        GroupSoftThresholding(1e-3),
        GradientValueClipping(0.05),
        GradientNormClipping(0.2),
        GradientNormClipping(0.01, norm_type=float("inf"), name="largest"),
        WeightClipping(0.1),
    ]


class LogPenalty(Penalty):
    """A penalty of one's own, which needs whole tensors."""

    def value(self, params: list[Tensor]) -> Tensor:
        return sum(p.square().log1p().sum() for p in params)


def all_alike(name: str, p: Tensor) -> Tensor:
    """Score all weights alike: what is pruned depends on the order of ties alone."""
    return torch.zeros_like(p)


def descending(name: str, p: Tensor) -> Tensor:
    """Give whole scores, from the last weight to the first, however the parameter is sharded."""
    return -torch.arange(p.numel(), dtype=torch.float32).view(p.shape)


def drawn_by_each_rank(name: str, p: Tensor) -> Tensor:
    """The naive version of random pruning."""
    return torch.rand(p.shape, generator=torch.Generator().manual_seed(int(os.environ["RANK"])))


# where everything is selected, a tensor that is not sharded and one of whose shards is empty are among the weights
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "per layer": {"scope": "layer", "params": "net.*.weight"},
    "random": {"criterion": "random", "params": "net.*.weight"},
    "units": {"structure": "unit"},
    "units per layer": {"structure": "unit", "scope": "layer", "params": "net.*.weight"},
    "random units": {"structure": "unit", "criterion": "random", "params": "net.*.weight"},
    "2:4": {"sparsity": 0.5, "structure": "2:4", "params": "net.*.weight"},
    "ties": {"criterion": all_alike, "params": "net.*.weight", "sparsity": 0.37},
    "whole scores": {"criterion": descending, "scope": "layer", "params": "net.*.weight"},
}


def masks_of(model: LightningModule, way: dict[str, Any], ranks: list[int], **trainer: object) -> dict[str, Tensor]:
    """Prune weights that are bit for bit those of every other run, since they are not trained; return the masks."""
    model.lr = 0.0
    after = train([WeightPruning(**{"sparsity": 0.6, **way})], model, ranks, max_epochs=1, **trainer)
    return {name: p == 0 for name, p in after.items() if p.ndim > 1}


def gradual() -> WeightPruning:
    """Return pruning that does not depend on how sums are rounded."""
    return WeightPruning(Cubic(0.0, 0.7), criterion="random", params="net.*.weight")


def kept(ranks: list[int], state: dict[str, Any] | None = None, **trainer: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Prune while training, from the state of another run if one is given; return the state and the weights."""
    callback = gradual()
    if state is not None:
        callback.load_state_dict(state)
    weights = train([callback], Sharded(), ranks, **trainer)
    return callback.state_dict(), weights


def main(folder: Path) -> None:
    """Train in every way and save the weights of this rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results = {
        "all": train(techniques(), Digits(), [rank], **ddp()),
        "unseeded": train([Unseeded(0.1)], Digits(), [rank], **ddp()),
        "unused": train([L2Penalty(0.1, params="all")], Unused(), [rank], **ddp(find_unused_parameters=True)),
        "unused, plain DDP": train([L2Penalty(0.1, params="all")], Unused(), [rank], **ddp()),
        "refused, DDP": failure([L2Penalty(0.1, inject="loss")], Unused(), [rank], **ddp(find_unused_parameters=True)),
        "refused, sharded": failure([L2Penalty(0.1, inject="loss")], Sharded(), [rank], **sharded()),
        "naive, sharded": failure([Naive()], Sharded(), [rank], **sharded()),
        "sharded": train(sharded_techniques(), Sharded(), [rank], **sharded()),
    }
    for name, way in WAYS.items():
        results[f"masks, DDP, {name}"] = masks_of(Digits(), way, [rank], **ddp())
        results[f"masks, sharded, {name}"] = masks_of(Sharded(), way, [rank], **sharded())
    results["masks, unseeded"] = masks_of(Digits(), {"criterion": drawn_by_each_rank}, [rank], **ddp())
    results["pruned, sharded"] = kept([rank], **sharded())
    results["pruned again, sharded"] = kept([rank], results["pruned, sharded"][0], **sharded())
    results["naive, DDP"] = failure([Naive()], Unused(), [rank], **ddp(find_unused_parameters=True))  # breaks the group
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
