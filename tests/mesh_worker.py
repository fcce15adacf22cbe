"""One of four ranks on a 2×2 mesh: FSDP2 over tensor parallelism. It saves the norms and penalties of a layer.

Started by ``test_distributed_mesh.py`` through ``torch.distributed.run``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_reg._tensors.reductions import total_norm
from lightning_reg.functional import l1_penalty, l2_penalty


def layer() -> nn.Linear:
    """Return the same layer on every rank."""
    torch.manual_seed(0)
    return nn.Linear(6, 10)


def values(params: list[nn.Parameter]) -> dict[str, float]:
    """Return the norms and penalties of parameters."""
    results = {"L1": l1_penalty(params), "L2": l2_penalty(params)}
    results |= {f"norm {order}": total_norm(params, order) for order in (1.0, 2.0, float("inf"))}
    return {key: value.item() for key, value in results.items()}


def main(folder: Path) -> None:
    """Shard the layer and save what this rank computes."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(layer(), mesh["tensor"], ColwiseParallel())
    fully_shard(model, mesh=mesh["data"])
    placements = [type(placement).__name__ for placement in model.weight.placements]
    torch.save((placements, values(list(model.parameters()))), folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
