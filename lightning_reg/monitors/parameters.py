"""Shows what a fit does to parameters: their norms, their gradients, how far steps move them, and how strong penalties are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_reg._engine import _evaluation
from lightning_reg._engine.arguments import check_integer, described_value
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.regularizer import regularizers_of
from lightning_reg._engine.selection import selection_mask
from lightning_reg._engine.technique import Phase
from lightning_reg._tensors.shards import local_tensor, sum_over_shards
from lightning_reg.monitors.measures import (
    copy_with_squares,
    relative_norms,
    squares_of_each,
    sum_of_squares,
    update_sums_of_each,
)
from lightning_reg.penalties.activity import ActivityPenalty
from lightning_reg.penalties.base import Penalty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params

_KEYS = ("weight_norm", "grad_norm", "update_ratio", "zeros")


class ParameterMonitor(ParameterRegularizer):
    """Measure parameters, their gradients, and the true update of a step: ‖θ_after − θ_before‖ / ‖θ_before‖.

    Runs in: the optimizer step, once every ``every_n_steps`` steps; it changes nothing.

    For each parameter or group it logs ``reg/<name>/<parameter>/weight_norm``, ``grad_norm`` (after the backward pass, with
    penalties that are part of the loss, before clipping), ``update_ratio`` (all that the step did, with decay, constraints, and
    masks), and ``zeros`` (the fraction of entries that are 0). For each penalty of the trainer it logs
    ``reg/<name>/<penalty>/relative_norm``: the norm of its gradient, divided by that of the data's gradient, over what
    it penalizes. ``ActivityPenalty`` is left out, because its gradient needs a backward pass of its own.
    The values are in ``trainer.callback_metrics``, with and without a logger. Other steps cost nothing. One copy of the
    parameters is kept during the fit.
    Sharded parameters are measured as a whole. A step that accumulates batches is one step.

    Args:
        every_n_steps: The number of optimizer steps from one measurement to the next, ≥ 1.
        params: The parameters to measure: ``"all"``, ``"weights"``, a glob, a list of these, or a callable
            ``(name, parameter, module) -> bool``.
        groups: Names of groups, each with its parameters, given as for ``params``. Each group of the selected parameters is
            measured as one vector. By default each parameter is measured by itself.
        name: The name in metrics and checkpoints. By default it is made from the class and the selection.

    Raises:
        ValueError: If ``every_n_steps`` is not an integer ≥ 1, nothing is selected, or a fused optimizer unscales float16
            gradients only in its step.

    Example:
        >>> ParameterMonitor(every_n_steps=100, groups={"encoder": "encoder.*", "head": "head.*"})
        ParameterMonitor(every_n_steps=100, groups={'encoder': 'encoder.*', 'head': 'head.*'})
    """

    phase = Phase.MONITOR
    reads_weights = False
    supports_complex = True
    fit_attributes: ClassVar[tuple[str, ...]] = ("_measured", "_before", "_copies", "_shares", "_group_of")

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        params: Params = "all",
        groups: dict[str, str | list[str]] | None = None,
        name: str | None = None,
    ) -> None:
        check_integer("ParameterMonitor: every_n_steps", every_n_steps, 1)
        if groups is not None and not (isinstance(groups, dict) and all(isinstance(key, str) for key in groups)):
            raise TypeError(
                "ParameterMonitor: groups must map names to selections, as in {'head': 'head.*'}, got "
                f"{described_value(groups)}"
            )
        self.every_n_steps = every_n_steps
        self.groups = groups
        super().__init__(params, name)
        self._before: dict[int, list[Tensor]] = {}  # copies of this rank's parts, and their sums of squares, by id
        self._copies: dict[int, Tensor] = {}  # their memory, which is kept for the next step
        self._measured: dict[int, Tensor] = {}  # sums of squares of the gradients, by id
        self._shares: dict[str, Tensor] = {}
        self._group_of: dict[str, list[str]] = {}

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters and their groups."""
        super().attach(trainer, pl_module)
        self.require_unscaled_gradients(trainer)
        for group, selection in (self.groups or {}).items():
            for name, selected in self._checked_mask(pl_module, selection).items():
                if selected:
                    self._group_of.setdefault(name, []).append(group)

    def _checked_mask(self, pl_module: LightningModule, selection: Params) -> dict[str, bool]:
        try:
            return selection_mask(pl_module, selection)
        except ValueError as error:
            raise ValueError(f"{self.name}: groups: {error}") from None

    def detach(self) -> None:
        """Release the tensors."""
        super().detach()
        for held in (self._before, self._copies, self._measured, self._shares, self._group_of):
            held.clear()

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Measure the gradients, and remember the weights, if the step is due."""
        if (step.number + 1) % self.every_n_steps or step.evaluation:
            return
        assert self._trainer is not None, "the fit has started"
        self._measured.update(zip(map(id, params), _squares_of_gradients(params), strict=True))
        penalties = [cb for cb in regularizers_of(self._trainer) if isinstance(cb, Penalty)]
        self._shares.update({f"{name}/relative_norm": value for name, value in relative_norms(penalties, optimizer).items()})
        parts = [local_tensor(p.detach()) for p in params]
        copies = [self._memory(id(p), part) for p, part in zip(params, parts, strict=True)]
        squares = copy_with_squares(copies, parts)
        self._before.update({id(p): found for p, *found in zip(params, copies, squares, strict=True)})

    def _memory(self, key: int, part: Tensor) -> Tensor:
        """Return the memory of the last copy: new memory would cost more than all else."""
        kept = self._copies.get(key)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (part.shape, part.dtype, part.device):
            kept = self._copies[key] = torch.empty_like(part)
        return kept

    def after_step(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Measure the weights and the update, and log."""
        measured = [p for p in params if id(p) in self._before]
        if not measured:
            return
        assert self._trainer is not None, "the fit has started"
        gradients = [self._measured.pop(id(p)) for p in measured]
        copies, before = zip(*(self._before.pop(id(p)) for p in measured), strict=True)
        sums = update_sums_of_each(copies, [local_tensor(p.detach()) for p in measured])
        found = [
            _numbers([sum_over_shards(value.to(p.device), p) for value, p in zip(values, measured, strict=True)])
            for values in (gradients, before, sums)
        ]
        metrics = self._by_key(
            {
                self.name_of(p): (p.numel(), [new, gradient, change, old, zeros])
                for p, gradient, old, (new, change, zeros) in zip(measured, *found, strict=True)
            }
        )
        shares, self._shares = self._shares, {}
        relative = zip(shares, _numbers(list(shares.values())), strict=True)
        metrics.update({self.label(key, optimizer): value for key, value in relative})
        _evaluation.log_now(self._trainer, {f"reg/{self.name}/{key}": value for key, value in metrics.items()})

    def _by_key(self, rows: dict[str, tuple[int, list[float]]]) -> dict[str, float]:
        """Return the metrics of each parameter, or of each group."""
        grouped: dict[str, list[tuple[int, list[float]]]] = {}
        for name, row in rows.items():
            for key in [name] if self.groups is None else self._group_of.get(name, ()):
                grouped.setdefault(key, []).append(row)
        metrics: dict[str, float] = {}
        for key, found in grouped.items():
            entries = sum(count for count, _ in found)
            weights, gradients, updates, before, zeros = (
                sum(column) for column in zip(*(row for _, row in found), strict=True)
            )
            ratio = (updates / before) ** 0.5 if before else float("inf") if updates else 0.0
            values = (weights**0.5, gradients**0.5, ratio, zeros / max(entries, 1))
            metrics |= {f"{key}/{what}": value for what, value in zip(_KEYS, values, strict=True)}
        return metrics

    def notes(self) -> list[str]:
        """Say which penalties are left out."""
        left_out = (
            [cb.name for cb in regularizers_of(self._trainer) if isinstance(cb, ActivityPenalty)] if self._trainer else []
        )
        reason = "because its gradient needs a backward pass of its own"
        return [*super().notes(), *(f"{self.name} does not measure {name}, {reason}" for name in left_out)]

    def route(self) -> str:
        """Return when it measures."""
        return f"every {self.every_n_steps} steps"


def _squares_of_gradients(params: Sequence[Parameter]) -> list[Tensor]:
    """Return the sum of squares of this rank's part of each gradient."""
    gradients = [None if p.grad is None or p.grad.is_sparse else local_tensor(p.grad) for p in params]
    squares = iter(squares_of_each([gradient for gradient in gradients if gradient is not None]))
    return [
        next(squares) if gradient is not None else sum_of_squares([] if p.grad is None else [p.grad])
        for p, gradient in zip(params, gradients, strict=True)
    ]


def _numbers(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the values of tensors of one shape, with a single transfer from a device if they are on one."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return [tensor.tolist() for tensor in tensors]
    values: list[Any] = torch.stack(list(tensors)).tolist()
    return values
