"""One rank of a distributed run that does the same with both packages of Lightning, and saves what comes of it.

Started by ``test_pytorch_lightning_ranks.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning_worker import PACKAGES, accumulation, classifier, result, trained
from table import ROWS, everything
from torch import nn

from lightning_reg import GradientNormClipping, L1Penalty, Linear, NonFiniteGradientGuard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANKS = {"strategy": "ddp", "devices": 2}


class Overflows:
    """A mixin for a model whose loss is infinite on the second rank only, in the third batch."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
        return loss * float("inf") if batch_idx == 1 and self.trainer.global_rank == 1 else loss


def with_row(package: Any, make: Callable[[], Any], options: dict[str, float]) -> Any:
    """Train with the callback of a row."""
    return trained(package, [make()], classifier(package)(**options), max_epochs=1, **RANKS)


def in_any_order(package: Any) -> Any:
    """Train with all callbacks, which the ranks list in opposite orders, while accumulation changes."""
    callbacks: Sequence[Any] = everything()
    listed = callbacks if os.environ["RANK"] == "0" else callbacks[::-1]
    return trained(package, [*listed, accumulation(package)], max_epochs=3, **RANKS)


def counted(package: Any) -> Any:
    """Train with a schedule over optimizer steps and with clipping, while accumulation changes."""
    callbacks = [L1Penalty(Linear(0.0, 0.1, until="3st")), GradientNormClipping(0.1), accumulation(package)]
    return trained(package, callbacks, max_epochs=3, **RANKS)


def guarded(package: Any) -> Any:
    """Train with a step that one rank cannot take."""
    return trained(package, [NonFiniteGradientGuard(), L1Penalty(0.1)], classifier(package, Overflows)(), **RANKS)


def averaged(package: Any) -> Any:
    """Train with averages of the weights."""
    model = classifier(package)()
    model.net[1] = nn.LayerNorm(16)
    averaging = package.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)
    return trained(package, [*everything(), averaging], model, max_epochs=3, **RANKS)


def checks(package: Any) -> dict[str, Callable[[], Any]]:
    """Return everything that is done with a package, by name."""
    return {
        "plain": lambda: trained(package, [], max_epochs=1, **RANKS),
        **{f"active {name}": partial(with_row, package, row.active, row.options) for name, row in ROWS.items()},
        **{f"scheduled {name}": partial(with_row, package, r.scheduled, r.options) for name, r in ROWS.items() if r.scheduled},
        "in any order": partial(in_any_order, package),
        "counted": partial(counted, package),
        "guarded": partial(guarded, package),
        "averaged": partial(averaged, package),
    }


def main(folder: Path) -> None:
    """Do everything with both packages."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {name: {what: result(check) for what, check in checks(package).items()} for name, package in PACKAGES.items()}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
