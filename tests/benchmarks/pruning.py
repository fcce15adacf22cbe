"""Global magnitude pruning, compared with torch's function, which Lightning's ``ModelPruning`` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import prune

from lightning_reg.functional import mask_, pruning_masks
from tests.benchmarks.measuring import Comparison

if TYPE_CHECKING:
    from torch import Tensor


def comparison(label: str, params: list[Tensor], sparsity: float) -> Comparison:
    """Return the comparison of pruning to a sparsity. torch's function is so slow that it runs only once."""
    weights = [p.detach() for p in params]
    pruned = [weight.clone() for weight in weights]  # other comparisons use the weights too

    def ours() -> None:
        mask_(pruned, pruning_masks(weights, sparsity))

    def other() -> None:
        modules = [nn.ParameterList([weight]) for weight in weights]
        prune.global_unstructured([(module, "0") for module in modules], prune.L1Unstructured, amount=sparsity)

    return Comparison(f"prune {label} to {sparsity:.0%}", ours, other, once=True)


def report_threshold(label: str, params: list[Tensor], sparsity: float) -> str:
    """Return how many weights are pruned, the largest of them, and the smallest weight that is kept."""
    weights = [p.detach() for p in params]
    masks = pruning_masks(weights, sparsity)
    pruned = sum(int(mask.count_nonzero()) for mask in masks)
    largest = max(float(w[m].abs().max()) for w, m in zip(weights, masks, strict=True) if m.any())
    smallest = min(float(w[~m].abs().min()) for w, m in zip(weights, masks, strict=True) if not m.all())
    target = round(sparsity * sum(weight.numel() for weight in weights))
    return (
        f"{pruned:,} weights are pruned, of {label} (target: {target:,}). The largest pruned magnitude is {largest!r}, the "
        f"smallest kept magnitude is {smallest!r}"
    )
