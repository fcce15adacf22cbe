"""One rank of a distributed run. It trains the digits model in several ways and saves the results.

Started by ``test_distributed.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from helpers import QUIET, Memory, digits, seed, validating
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from optimizers import CopyingSam
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import (
    ActivityPenalty,
    AdaptiveGradientClipping,
    Cubic,
    DropoutInjection,
    DropoutScheduler,
    ElasticNetPenalty,
    GradientCentralization,
    GradientNoise,
    GradientNormClipping,
    GradientValueClipping,
    GroupLassoPenalty,
    GroupSoftThresholding,
    L1Penalty,
    L2Penalty,
    Linear,
    MaxNorm,
    MinMaxNorm,
    NonFiniteGradientGuard,
    OrthogonalityPenalty,
    PeakGradientDropping,
    Penalty,
    QuantileGradientClipping,
    RandomShrinkage,
    SoftThresholding,
    StartingPointPenalty,
    UnitNorm,
    WeightClipping,
    WeightDecay,
    WeightPruning,
    ZScoreGradientClipping,
)
from lightning_reg.functional import l1_penalty, l2_penalty

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS, STEPS, BATCH = 2, 6, 16


def techniques() -> list[Callback]:
    """Return all techniques, each strong enough to matter."""
    return [
        WeightClipping(0.1),
        RandomShrinkage(0.01),
        RandomShrinkage(0.02, every="epoch", params="net.6.weight"),
        GradientNormClipping(Linear(0.5, 0.1), params="net.1.*"),
        *gradient_processing(),
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


def gradient_processing() -> list[Callback]:
    """Return gradient techniques that support shards. They act on separate parameters where one could mask another."""
    return [
        AdaptiveGradientClipping(0.05, params="net.4.*"),
        QuantileGradientClipping(0.1, window=4, params="net.6.bias"),
        ZScoreGradientClipping(0.2, decay=0.3, warmup=2, params="net.1.bias"),
        GradientCentralization(),
        GradientNoise(0.01),
    ]


class Digits(LightningModule):
    """A perceptron with two hidden layers. Its dropout depends only on the samples, not on the rank that computes them."""

    def __init__(self, weight_decay: float = 0.0, validates: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.lr, self.weight_decay = 0.1, weight_decay
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        if validates:
            self.__class__ = validating(type(self))

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, labels, numbers = batch
        seed(int(numbers[0]))
        return nn.functional.cross_entropy(self(images.view(-1, 8, 8)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)


def batches(ranks: list[int]) -> DataLoader[tuple[Tensor, ...]]:
    """Return the batches of some ranks. Each step's global batch is divided evenly."""
    images, labels = digits(RANKS * STEPS * BATCH)
    numbers = torch.arange(len(labels)).view(STEPS, RANKS, BATCH)
    sampler = [numbers[step, rank].tolist() for step in range(STEPS) for rank in ranks]
    return DataLoader(TensorDataset(images, labels, torch.arange(len(labels))), batch_sampler=sampler)


def train(callbacks: list[Callback], model: LightningModule, ranks: list[int], **trainer: object) -> dict[str, Tensor]:
    """Train for two epochs and return the weights."""
    options = {"max_epochs": 2, "use_distributed_sampler": False, "logger": Memory(), "log_every_n_steps": 1, **trainer}
    Trainer(**{**QUIET, **options}, callbacks=callbacks).fit(model, batches(ranks))
    return {name: full_tensor(p) for name, p in model.named_parameters()}


def full_tensor(p: Tensor) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


class Unseeded(RandomShrinkage):
    """The naive version: each rank has its own generator."""

    def _shrink(self, params: list[nn.Parameter], step: int) -> None:
        for p in params:
            p.mul_(1 - self.epsilon * torch.rand(p.shape, generator=self.generator))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.generator = torch.Generator().manual_seed(trainer.global_rank)


class Masked(Digits):
    """The digits model with dropout from the global generator. It records the first masks of two dropout sites.

    Args:
        seed_per_rank: Whether each rank has its own seed; otherwise all share one, as after ``seed_everything``.
    """

    def __init__(self, seed_per_rank: bool) -> None:
        super().__init__()
        self.seed_per_rank = seed_per_rank
        self.masks: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        torch.manual_seed(self.trainer.global_rank if self.seed_per_rank else 0)
        for name in ("net.2", "net.3"):
            self.get_submodule(name).register_forward_hook(self.record_mask(name))

    def record_mask(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self.masks.setdefault(name, (output == 0).detach().clone())

        return hook

    def forward(self, images: Tensor) -> Tensor:
        if not self.masks:
            self.net(torch.ones_like(images))  # same images on every rank
        return super().forward(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0].view(-1, 8, 8)), batch[1])


class Unused(Digits):
    """The digits model with a layer that the forward pass skips."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        nn.init.constant_(self.unused.weight, 0.5)


class Sharded(Digits):
    """The digits model with all parameters sharded across the ranks, except for ``plain``."""

    def __init__(self, weight_decay: float = 0.0, validates: bool = False) -> None:
        super().__init__(weight_decay, validates)
        self.plain_weight = nn.Parameter(torch.full((1, 1), 0.09))  # a plain tensor among DTensors
        self.single = nn.Linear(4, 1, bias=False)  # one of its shards is empty
        self.up = nn.ConvTranspose1d(6, 6, 3, groups=3)  # shards cut across its groups

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.up(torch.ones(1, 6, 2)).square().mean()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[1], self.net[6], self.single, self.up):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            columns = lambda p: Shard(p.ndim - 1)  # noqa: E731
            fully_shard(self.net[4], mesh=self.device_mesh["data_parallel"], shard_placement_fn=columns)  # units span shards


class Poisoned(Sharded):
    """One batch gives one parameter a non-finite gradient. Under FSDP2, only one rank holds it."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        factor = float("nan") if int(batch[2][0]) // (RANKS * BATCH) == 2 else 0.0  # in the third step of an epoch
        return super().training_step(batch, batch_idx) + factor * self.single(torch.ones(1, 4)).sum()


class SyncedNorm(nn.BatchNorm1d):
    """Batch normalization over both ranks; torch's own needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        mean, square = (all_reduce(value) / RANKS for value in (x.mean(0), x.square().mean(0)))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(square - mean.square(), self.momentum)
        return (x - mean) / (square - mean.square() + self.eps).sqrt() * self.weight + self.bias


class Normalized(Digits):
    """A model with batch normalization. The last batch of the second rank is bad."""

    def __init__(self, norm: type[nn.BatchNorm1d]) -> None:
        super().__init__()
        self.net[3] = norm(32)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self.before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        images, labels, numbers = batch
        bad = batch_idx == STEPS - 1 and os.environ["RANK"] == "1"
        return super().training_step((images * float("nan") if bad else images, labels, numbers), batch_idx)


def buffers_after_bad_batch(norm: type[nn.BatchNorm1d], ranks: list[int]) -> dict[str, Any]:
    """Train with the guard, and return the running statistics before and after the bad batch."""
    model = Normalized(norm)
    train([NonFiniteGradientGuard()], model, ranks, max_epochs=1, **ddp())
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return {"before": model.before, "after": dict(model.named_buffers()), "finite": finite}


class PoisonedSam(Poisoned):
    """With an optimizer that evaluates its closure twice in each step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CopyingSam(self.parameters(), lr=self.lr)


class OwnStep(torch.optim.SGD):
    """An optimizer whose step is not torch's own code, and may read the value of its closure."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class PoisonedOwnStep(Poisoned):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OwnStep(self.parameters(), lr=self.lr, momentum=0.9)


def around_the_step() -> list[Callback]:
    """Return techniques that act before, in, and after a step, of which one skips some."""
    penalties = [L2Penalty(1e-2), LogPenalty(0.1)]
    return [NonFiniteGradientGuard(), *penalties, GradientNormClipping(0.5), WeightDecay(0.5), WeightClipping(0.1)]


def ddp(**kwargs: bool) -> dict[str, object]:
    """Return trainer arguments for one rank of DDP. Each trainer needs a new strategy."""
    return {"strategy": DDPStrategy(process_group_backend="gloo", **kwargs), "devices": RANKS}


def sharded() -> dict[str, object]:
    """Return trainer arguments for one rank of FSDP2."""
    return {"strategy": ModelParallelStrategy(RANKS, 1), "devices": RANKS}


def failure(callbacks: list[Callback], model: LightningModule, ranks: list[int], **trainer: object) -> str:
    """Train and return the error message, or an empty string."""
    try:
        train(callbacks, model, ranks, **trainer)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return str(error) or type(error).__name__
    return ""


def train_with_dropout(seed_per_rank: bool, rank: int) -> dict[str, object]:
    """Train with injected and scheduled dropout; return the weights and the first masks."""
    model = Masked(seed_per_rank)
    callbacks = [DropoutInjection(0.5, after="net.2"), DropoutScheduler(Linear(0.5, 0.1), modules="Dropout")]
    return {"weights": train(callbacks, model, [rank], **ddp()), "masks": model.masks}


class Naive(Callback):
    """A naive penalty: a Python sum, added to the loss in every backward pass."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss.add_(0.05 * sum(p.square().sum() for p in pl_module.parameters() if p.ndim > 1))


def sharded_techniques() -> list[Callback]:
    """Return techniques that support sharded parameters."""
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
        GradientNormClipping(0.1, params="net.1.*"),
        *gradient_processing(),
        GradientNormClipping(0.01, norm_type=float("inf"), name="largest"),
        DropoutInjection(0.2, after="net.1"),  # FSDP2 has changed the class of this module
        DropoutScheduler(Linear(0.0, 0.3), modules="Dropout"),
        WeightClipping(0.1),
        MaxNorm(0.3, params="net.1.weight"),
        MinMaxNorm(0.2, 0.4, rate=0.5, params="net.4.weight"),
        UnitNorm(params="single.weight"),
        AdaptiveGradientClipping(0.01, params="up.weight"),
        UnitNorm(params="up.weight"),
        PeakGradientDropping(2, params=["all", "!plain_weight"]),
        RandomShrinkage(0.01),
        RandomShrinkage(0.02, every="epoch", params="net.6.weight"),
    ]


class LogPenalty(Penalty):
    """A custom penalty that needs whole tensors."""

    def value(self, params: list[Tensor]) -> Tensor:
        return sum(p.square().log1p().sum() for p in params)


def equal_scores(name: str, p: Tensor) -> Tensor:
    """Score all weights equally, so that only the order of ties decides what is pruned."""
    return torch.zeros_like(p)


def descending_scores(name: str, p: Tensor) -> Tensor:
    """Return descending scores for the whole parameter, even if it is sharded."""
    return -torch.arange(p.numel(), dtype=torch.float32).view(p.shape)


def scores_of_this_rank(name: str, p: Tensor) -> Tensor:
    """Return scores that differ between ranks, like statistics of their samples."""
    return random_scores(p, int(os.environ["RANK"]))


def scores_of_shards(name: str, p: Tensor) -> Tensor:
    """Return scores for what this rank holds only."""
    return (p.to_local() if hasattr(p, "to_local") else p).detach().abs()


def scores_of_one_rank(name: str, p: Tensor) -> Tensor | None:
    """Return scores on one of the ranks only."""
    return None if os.environ["RANK"] == "1" else p.detach().abs()


WRONG_SCORES: dict[str, tuple[Callable[[str, Tensor], Any], str]] = {
    "shards": (scores_of_shards, "net.1.weight"),
    "empty shard": (scores_of_shards, "single.weight"),  # the other rank holds all of it
    "one rank": (scores_of_one_rank, "net.1.weight"),
}


def mean_scores(name: str, p: Tensor) -> Tensor:
    """Return the mean of both ranks' scores."""
    return (random_scores(p, 0) + random_scores(p, 1)) / 2


def random_scores(p: Tensor, rank: int) -> Tensor:
    """Return a rank's random scores."""
    return torch.rand(p.shape, generator=torch.Generator().manual_seed(rank))


# Without params, the weights include a plain tensor and one with an empty shard.
PRUNING: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "per layer": {"scope": "layer", "params": "net.*.weight"},
    "random": {"criterion": "random", "params": "net.*.weight"},
    "units": {"structure": "unit", "params": "weights"},
    "units per layer": {"structure": "unit", "scope": "layer", "params": "net.*.weight"},
    "random units": {"structure": "unit", "criterion": "random", "params": "net.*.weight"},
    "2:4": {"sparsity": 0.5, "structure": "2:4", "params": "net.*.weight"},
    "ties": {"criterion": equal_scores, "params": "net.*.weight", "sparsity": 0.37},
    "whole scores": {"criterion": descending_scores, "scope": "layer", "params": "net.*.weight"},
}


def masks_of(model: LightningModule, options: dict[str, Any], ranks: list[int], **trainer: object) -> dict[str, Tensor]:
    """Prune untrained weights, which are bit-identical in all runs; return the masks."""
    model.lr = 0.0
    after = train([WeightPruning(**{"sparsity": 0.6, **options})], model, ranks, max_epochs=1, **trainer)
    return {name: p == 0 for name, p in after.items() if p.ndim > 1}


def gradual() -> WeightPruning:
    """Return pruning that does not depend on the rounding of sums."""
    return WeightPruning(Cubic(0.0, 0.7), criterion="random", params="net.*.weight")


def train_and_prune(
    ranks: list[int], state: dict[str, Any] | None = None, **trainer: object
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Prune while training, from the state of another run if given; return the state and the weights."""
    callback = gradual()
    if state is not None:
        callback.load_state_dict(state)
    weights = train([callback], Sharded(), ranks, **trainer)
    return callback.state_dict(), weights


def values_of_large_shards() -> dict[str, Tensor]:
    """Return penalties of large tensors: sharded by rows (unevenly), sharded by columns, replicated, and plain."""
    mesh = init_device_mesh("cpu", (2,))
    large = torch.full((3001, 2000), 0.3)
    params = [distribute_tensor(large, mesh, [placement]) for placement in (Shard(0), Shard(1), Replicate())] + [large]
    return {"L1": l1_penalty(params), "L2": l2_penalty(params), "norm": params[0].norm(1).full_tensor()}


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results = {
        "all": train(techniques(), Digits(), [rank], **ddp()),
        "unseeded": train([Unseeded(0.1)], Digits(), [rank], **ddp()),
        "masks": {seed_per_rank: train_with_dropout(seed_per_rank, rank) for seed_per_rank in (True, False)},
        "unused": train([L2Penalty(0.1, params="all")], Unused(), [rank], **ddp(find_unused_parameters=True)),
        "unused, plain DDP": train([L2Penalty(0.1, params="all")], Unused(), [rank], **ddp()),
        "error, DDP": failure([L2Penalty(0.1, inject="loss")], Unused(), [rank], **ddp(find_unused_parameters=True)),
        "error, sharded": failure([L2Penalty(0.1, inject="loss")], Sharded(), [rank], **sharded()),
        "naive, sharded": failure([Naive()], Sharded(), [rank], **sharded()),
        "guarded, DDP": train(
            [NonFiniteGradientGuard(), WeightDecay(0.1)], Poisoned(), [rank], **ddp(find_unused_parameters=True)
        ),
        "guarded, sharded": train([NonFiniteGradientGuard(), WeightDecay(0.1)], Poisoned(), [rank], **sharded()),
        "batch norm": buffers_after_bad_batch(nn.BatchNorm1d, [rank]),
        "synchronized batch norm": buffers_after_bad_batch(SyncedNorm, [rank]),
        "SAM, DDP": train(around_the_step(), PoisonedSam(), [rank], **ddp(find_unused_parameters=True)),
        "own step, sharded": train(around_the_step(), PoisonedOwnStep(), [rank], **sharded()),
        "sharded": train(sharded_techniques(), Sharded(), [rank], **sharded()),
    }
    results["values"] = values_of_large_shards()  # uses the process group of the last run
    for name, options in PRUNING.items():
        results[f"masks, DDP, {name}"] = masks_of(Digits(), options, [rank], **ddp())
        results[f"masks, sharded, {name}"] = masks_of(Sharded(), options, [rank], **sharded())
    for name, (criterion, params) in WRONG_SCORES.items():
        pruning = WeightPruning(0.5, criterion=criterion, params=params)
        results[f"error, {name}"] = failure([pruning], Sharded(), [rank], max_epochs=1, **sharded())
    results["masks, scores of each rank"] = masks_of(Digits(), {"criterion": scores_of_this_rank}, [rank], **ddp())
    results["pruned, sharded"] = train_and_prune([rank], **sharded())
    results["pruned again, sharded"] = train_and_prune([rank], results["pruned, sharded"][0], **sharded())
    results["naive, DDP"] = failure([Naive()], Unused(), [rank], **ddp(find_unused_parameters=True))  # breaks the group
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
