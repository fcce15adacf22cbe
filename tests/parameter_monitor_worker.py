"""One rank that measures sharded parameters, and the same parameters whole. Started by ``test_sharded_parameters.py``."""

from __future__ import annotations

import os
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from distributed_worker import full_tensor
from test_relative_norms import FACTORIES, ROUTES, given, in_loss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_reg._tensors.shards import local_tensor
from lightning_reg._tensors.units import Units
from lightning_reg.monitors.watched import Watched

if TYPE_CHECKING:
    from torch import Tensor

UNEVEN = [(4, 3), (5, 3), (4, 3), (1, 3), (5, 3), (6, 3), (3, 3)]
"""Shapes whose shards are stacked in different batches on each rank. One shard is empty."""
MODELS = {"matrices": UNEVEN, "vectors": [*UNEVEN, (5,), (1,), (7,)], "large": [(301, 301), (4, 3), (5, 3), (1, 3), (300, 301)]}
PLAIN = {"all sharded": (), "some sharded": (0, 3)}


def parameters(shapes: list[tuple[int, ...]]) -> nn.Module:
    """Return a module with the same parameters on every rank."""
    torch.manual_seed(0)
    module = nn.Module()
    module.held = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    return module


def sharded_like(tensor: Tensor, p: Tensor) -> Tensor:
    """Return a tensor that is sharded like a parameter, if that is."""
    return distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor


def measure(module: nn.Module, name: str, inject: str, dim: int) -> dict[str, Any]:
    """Return what is measured in a step, and the norms of this rank's parts."""
    params = list(module.held)
    torch.manual_seed(1)
    for p in params:
        p.grad = sharded_like(torch.randn(p.shape), p)
    penalty = given(FACTORIES[name], [], inject, units={id(p): Units(dim) for p in params})
    penalty.parameters_of = lambda optimizer: params  # type: ignore[method-assign]
    penalty._references = {id(p): sharded_like(torch.randn(p.shape), p) for p in params}
    watched = Watched(params, [[str(index)] for index in range(len(params))], "")
    optimizer = torch.optim.SGD(params, lr=0.1)
    with torch.no_grad():
        before = watched.before_step([penalty], optimizer, in_loss([penalty]))
        optimizer.step()
        after = watched.after_step(before)
    return {
        "values": dict(zip(watched.keys, after.tolist(), strict=True)),
        "relative": float(before.relative_norms[penalty.name]),
        "weights": [full_tensor(p) for p in params],
        "parts": [float(local_tensor(p.detach()).norm()) for p in params],
    }


def main(folder: Path) -> None:
    """Measure all variants and save the results of this rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, (model, shapes), (plain, indices), inject, dim in product(
        FACTORIES, MODELS.items(), PLAIN.items(), ROUTES, (0, 1)
    ):
        if (model == "vectors" and (dim or name == "orthogonality")) or (dim and name != "group lasso"):
            continue
        sharded = parameters(shapes)
        fully_shard(sharded, mesh=mesh, ignored_params={sharded.held[index] for index in indices})
        modules = {"sharded": sharded, "whole": parameters(shapes)}
        found = {key: measure(module, name, inject, dim) for key, module in modules.items()}
        results[f"{name}, {model}, {plain}, {inject}, {dim}"] = found
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
