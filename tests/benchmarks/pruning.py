"""Global magnitude pruning beside what ``ModelPruning`` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import prune

from lightning_reg.functional import mask_, pruning_masks
from tests.benchmarks.measuring import Claim

if TYPE_CHECKING:
    from torch import Tensor


def claim(label: str, params: list[Tensor], share: float, at_least: float) -> Claim:
    """Return the claim on pruning a share of parameters, whose peer is so slow that it is run once."""
    values = [p.detach() for p in params]
    pruned = [value.clone() for value in values]  # those of the other claims stay as they are

    def ours() -> None:
        mask_(pruned, pruning_masks(values, share))

    def theirs() -> None:
        holders = [nn.ParameterList([value]) for value in values]
        prune.global_unstructured([(holder, "0") for holder in holders], prune.L1Unstructured, amount=share)

    return Claim(f"prune to {share:.0%}, {label}", ours, theirs, at_least, once=True)


def report_masks(label: str, params: list[Tensor], share: float) -> str:
    """Say whether the threshold is exact: how many weights are pruned, and how many of these exceed one that is kept."""
    values = [p.detach() for p in params]
    masks = pruning_masks(values, share)
    pruned = sum(int(mask.count_nonzero()) for mask in masks)
    largest = max(float(v[m].abs().max()) for v, m in zip(values, masks, strict=True) if m.any())
    smallest = min(float(v[~m].abs().min()) for v, m in zip(values, masks, strict=True) if not m.all())
    asked = round(share * sum(value.numel() for value in values))
    return (
        f"Pruned of {label}: {pruned:,}, asked for {asked:,}; "
        f"the largest of them {largest!r}, the smallest that is kept {smallest!r}"
    )
