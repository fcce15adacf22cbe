"""One rank of a distributed run that prunes the digits model in several ways and saves the results.

Started by ``test_distributed_pruning.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_worker import Digits, ddp, train

from lightning_reg import Cubic, WeightPruning

REWINDS: dict[str, Any] = {"pruned": {}, "rewound": {"rewind_to_step": 1}}


class WithAdam(Digits):
    """The digits model with Adam, whose state pruning and rewinding clear."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class WithZero(Digits):
    """The same, with the state of each parameter on one rank only."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=0.01)


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    for name, options in REWINDS.items():
        for model in (WithAdam, WithZero):
            results[f"{name}, {model.__name__}"] = train([WeightPruning(Cubic(0.0, 0.8), **options)], model(), [rank], **ddp())
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
