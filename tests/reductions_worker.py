"""One rank of DDP runs in which the reduction of gradients is not a plain mean. It saves the weights, or the error.

Started by ``test_reductions.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distributed_worker import Digits, ddp, failure, train
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook as powersgd

from lightning_reg import ActivityPenalty, L1Penalty, L2Penalty, NonFiniteGradientGuard
from lightning_reg.custom import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STRENGTH, WEAK = 0.1, 1e-6


class ByHand(Callback):
    """L2 as a user would add it to the reduced gradients."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        for p in pl_module.parameters():
            if p.ndim > 1:
                p.grad.add_(p.detach(), alpha=self.strength)


class Still(Digits):
    """A model whose loss has no gradient, so that only the penalty moves it."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


class Embedded(Digits):
    """With an embedding that has sparse gradients; not all of its rows are used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64, sparse=True)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, labels, numbers = batch
        return super().training_step((images + self.embedding(labels), labels, numbers), batch_idx)


class Bad(Digits):
    """One entry of a bias and of a weight has a NaN gradient in one batch of one rank."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        factor = float("nan") if int(batch[2][0]) == 64 else 0.0
        return super().training_step(batch, batch_idx) + factor * (self.net[6].weight[0, 0] + self.net[6].bias[1])


class OnceBad(Digits):
    """One gradient is NaN in the second step, and PowerSGD keeps it."""

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        factor = float("nan") if self.trainer.fit_loop.total_batch_idx == 4 else 0.0
        return super().training_step(batch, batch_idx) + factor * self.net[1].weight.sum()


class Weighted(Penalty):
    """A penalty that depends on the samples of a rank: on the first it weighs twice as much, and only there counts a bias."""

    def value(self, params: Sequence[Tensor]) -> Tensor:
        first = os.environ.get("RANK", "0") == "0"
        matrices = [p for p in params if p.ndim > 1 or first]
        return (2.0 if first else 1.0) * sum(p.square().sum() for p in matrices)


class Aside(Digits):
    """With a layer whose output the loss ignores, unless ``used``."""

    def __init__(self, used: bool = False) -> None:
        super().__init__()
        self.aside, self.used = nn.Linear(64, 8), used

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        output = self.aside(batch[0]).square().mean()
        return super().training_step(batch, batch_idx) + (output if self.used else 0.0)


class Hooked(DDPStrategy):
    """DDP with a communication hook, which Lightning's own registers on a GPU only."""

    def __init__(self, state: object, hook: Callable[..., Any]) -> None:
        super().__init__(process_group_backend="gloo")
        self.hook = state, hook

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(*self.hook)


class RegistersLater(Callback):
    """Registers a hook when the fit starts, after a penalty has been attached."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def powersgd_options() -> dict[str, Any]:
    state = powersgd.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5)
    return {"strategy": Hooked(state, powersgd.powerSGD_hook), "devices": 2}


def fp16_options() -> dict[str, Any]:
    return {"strategy": Hooked(None, default_hooks.fp16_compress_hook), "devices": 2}


def both(make: Callable[[], LightningModule], strength: float, options: Callable[[], dict[str, Any]], rank: int) -> list[Any]:
    """Train with our L2 and with one by hand."""
    return [train([callback], make(), [rank], **options()) for callback in (L2Penalty(strength), ByHand(strength))]


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    guarded = [L2Penalty(STRENGTH), L1Penalty(1e-3), NonFiniteGradientGuard("zero")]
    aside = lambda: [ActivityPenalty(0.1, modules="aside")]  # noqa: E731
    results = {
        "fp16": both(Still, WEAK, fp16_options, rank),
        "fp16, later": train([L2Penalty(WEAK), RegistersLater()], Still(), [rank], **ddp()),
        "PowerSGD": both(Digits, STRENGTH, powersgd_options, rank),
        "PowerSGD, NaN": failure([NonFiniteGradientGuard(patience=4)], OnceBad(), [rank], **powersgd_options()),
        "no hook, NaN": failure([NonFiniteGradientGuard(patience=4)], OnceBad(), [rank], **ddp()),
        "fp16, loss": failure([L2Penalty(WEAK, inject="loss")], Still(), [rank], **fp16_options()),
        "sparse": train([L2Penalty(STRENGTH, params="all")], Embedded(), [rank], **ddp()),
        "sparse, loss": failure([L2Penalty(STRENGTH, params="all", inject="loss")], Embedded(), [rank], **ddp()),
        "sparse, others": train([L2Penalty(STRENGTH, params="net.*", inject="loss")], Embedded(), [rank], **ddp()),
        "guarded": train(guarded, Bad(), [rank], **ddp()),
        "guarded, loss": failure([L2Penalty(0.1, inject="loss"), NonFiniteGradientGuard("zero")], Bad(), [rank], **ddp()),
        "of samples, gradient": train([Weighted(STRENGTH, params="net.1.*", inject="gradient")], Digits(), [rank], **ddp()),
        "of samples, loss": train([Weighted(STRENGTH, params="net.1.*", inject="loss")], Digits(), [rank], **ddp()),
        "ignored": train(aside(), Aside(used=True), [rank], **ddp(find_unused_parameters=True)),
        "plain DDP": train(aside(), Aside(), [rank], **ddp()),
    }
    torch.save(results, folder / f"{rank}.pt")
    results["error"] = failure(aside(), Aside(), [rank], **ddp(find_unused_parameters=True))
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
