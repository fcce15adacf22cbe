"""One of four ranks on a 2×2 mesh: FSDP2 over tensor parallelism. It trains each callback of the table, and prunes.

Started by ``test_distributed_mesh.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distributed_worker import PRUNING, Sharded, masks_of, train
from helpers import Memory
from lightning.pytorch.strategies import ModelParallelStrategy
from table import ROWS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_reg._tensors.reductions import total_norm
from lightning_reg.functional import drop_peak_gradients_, l1_penalty, l2_penalty

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
    from torch import Tensor

RANKS = 4


class Meshed(Sharded):
    """The digits model with layers that are split by columns or by rows over two ranks, and sharded over two others.

    Without dropout, since each rank draws masks for its part of the activations, as torch's dropout does.
    """

    def __init__(self, weight_decay: float = 0.0, validates: bool = False) -> None:
        super().__init__(weight_decay, validates)
        self.net[3].p = 0.0

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            plan = {"net.1": ColwiseParallel(), "net.4": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
            for layer in (self.net[1], self.net[4], self.net[6], self.single, self.up):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def meshed() -> dict[str, object]:
    """Return trainer arguments for one of four ranks."""
    return {"strategy": ModelParallelStrategy(2, 2), "devices": RANKS}


def train_and_log(
    callbacks: list[Callback], model: LightningModule, ranks: list[int], **trainer: object
) -> tuple[dict[str, Tensor], dict[int, dict[str, float]]]:
    """Train for an epoch; return the weights and the logged metrics of each step."""
    memory = Memory()
    return train(callbacks, model, ranks, max_epochs=1, logger=memory, **trainer), memory.steps


# Values of one layer -------------------------------------------------------------------------------------------------


def layer() -> nn.Linear:
    """Return the same layer on every rank."""
    torch.manual_seed(0)
    return nn.Linear(6, 10)


def values(params: list[nn.Parameter]) -> dict[str, float]:
    """Return the norms and penalties of parameters."""
    results = {"L1": l1_penalty(params), "L2": l2_penalty(params)}
    results |= {f"norm {order}": total_norm(params, order) for order in (1.0, 2.0, float("inf"))}
    return {key: value.item() for key, value in results.items()}


def dropped_peaks(params: list[nn.Parameter]) -> list[Tensor]:
    """Return gradients with many equal entries, without their peaks, for several numbers of peaks."""
    results = []
    for p in params:
        for k in (1, 2, 7, p.numel() - 1, p.numel() + 1):
            p.grad = (p.detach() * 8).round()
            drop_peak_gradients_([p], k)
            results.append(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
    return results


def values_of_layers(style: Any) -> tuple[list[str], dict[str, float], list[Tensor]]:
    """Return the placements and the values of a sharded layer."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(layer(), mesh["tensor"], style)
    fully_shard(model, mesh=mesh["data"])
    placements = [type(placement).__name__ for placement in model.weight.placements]
    params = list(model.parameters())
    return placements, values(params), dropped_peaks(params)


def main(folder: Path) -> None:
    """Train all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    data = [rank // 2]  # two ranks in a row see the same samples
    results: dict[str, object] = {}
    for name, row in ROWS.items():
        results[name] = train_and_log([row.active()], Meshed(**row.options), data, **meshed())
    results["none"] = train_and_log([], Meshed(), data, **meshed())
    for name, options in PRUNING.items():
        results[f"masks, {name}"] = masks_of(Meshed(), options, data, **meshed())
    for style in (ColwiseParallel(), RowwiseParallel()):
        results[type(style).__name__] = values_of_layers(style)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
