"""Shows what a fit does to parameters: norms, gradients, how far each step moves them, and how strong penalties are."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from lightning_reg._engine import _evaluation
from lightning_reg._engine.arguments import check_integer, described_value
from lightning_reg._engine.parameters import ParameterRegularizer
from lightning_reg._engine.regularizer import regularizers_of
from lightning_reg._engine.selection import selection_mask
from lightning_reg._engine.technique import Phase
from lightning_reg.monitors.watched import Watched
from lightning_reg.penalties.activity import ActivityPenalty
from lightning_reg.penalties.base import Penalty

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params
    from lightning_reg.monitors.relative import Before


class ParameterMonitor(ParameterRegularizer):
    """Measure parameters, their gradients, and the true update of a step: ‖θ_after − θ_before‖ / ‖θ_before‖.

    Runs in: the optimizer step, once every ``every_n_steps`` steps. Changes nothing.

    For each parameter or group it logs ``reg/<name>/<parameter>/weight_norm``, ``grad_norm`` (after the backward pass, with
    penalties that are part of the loss, before clipping), ``update_ratio`` (the whole step, including decay, constraints, and
    masks), and ``zeros`` (the fraction of entries that are 0). For each penalty of the trainer it logs
    ``reg/<name>/<penalty>/relative_norm``: the norm of its gradient, divided by that of the data's gradient, over the
    parameters that it penalizes. ``ActivityPenalty`` is left out, because its gradient needs a separate backward pass.
    The values are in ``trainer.callback_metrics``, with and without a logger. Other steps cost nothing. The callback keeps one
    copy of the parameters during the fit.
    Sharded parameters are measured as a whole. A step that accumulates batches is one step.

    Args:
        every_n_steps: The number of optimizer steps from one measurement to the next, ≥ 1.
        params: The parameters to measure: ``"all"``, ``"weights"``, a glob, a list of these, or a callable
            ``(name, parameter, module) -> bool``.
        groups: A mapping from names of groups to parameters, given as for ``params``. Each group of the selected parameters is
            measured as one vector. By default, each parameter is measured separately.
        name: The name in metrics and checkpoints. Built from the class and the selection by default.

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
    fit_attributes: ClassVar[tuple[str, ...]] = ("_watched", "_before", "_group_of")

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
        self._watched: dict[tuple[int, ...], Watched] = {}
        self._before: dict[Optimizer, tuple[Watched, Before]] = {}  # of the steps that are being taken
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
        for held in (self._watched, self._before, self._group_of):
            held.clear()

    def gradients(self, params: list[Parameter], optimizer: Optimizer, step: Step) -> None:
        """Measure the gradients, and remember the weights, if the step is due."""
        if step.evaluation:
            return
        self._before.pop(optimizer, None)  # of a step that a loss scaler has skipped
        if (step.number + 1) % self.every_n_steps:
            return
        assert self._trainer is not None, "the fit has started"
        if self.groups is not None:
            params = [p for p in params if self._groups_of(p)]
        if params:
            penalties = [cb for cb in regularizers_of(self._trainer) if isinstance(cb, Penalty)]
            in_loss = [cb for cb in penalties if cb.adds_to_loss] if step.is_penalized else []
            watched = self._watched_of(params)
            self._before[optimizer] = watched, watched.before_step(penalties, optimizer, in_loss)

    def _watched_of(self, params: list[Parameter]) -> Watched:
        """Return the objects that persist between steps, or new ones if the parameters have changed."""
        key = tuple(map(id, params))
        watched = self._watched.get(key)
        if watched is None or not watched.fits(params):
            for outdated in [old for old in self._watched if not set(old).isdisjoint(key)]:
                del self._watched[outdated]
            watched = self._watched[key] = Watched(params, list(map(self._groups_of, params)), f"reg/{self.name}/")
        return watched

    def _groups_of(self, p: Parameter) -> Sequence[str]:
        """Return the groups of a parameter, or else its name."""
        name = self.name_of(p)
        return [name] if self.groups is None else self._group_of.get(name, ())

    def after_step(self, params: list[Parameter], optimizer: Optimizer) -> None:
        """Measure the weights and the update, and log."""
        if optimizer not in self._before:
            return
        assert self._trainer is not None, "the fit has started"
        watched, before = self._before.pop(optimizer)
        values = watched.after_step(before)
        found = before.relative_norms
        keys = [f"reg/{self.name}/{self.label(f'{name}/relative_norm', optimizer)}" for name in found]
        values = torch.cat([values, *(norm[None].to(values) for norm in found.values())])
        _evaluation.log_now(self._trainer, [*watched.keys, *keys], values)

    def notes(self) -> list[str]:
        """List the penalties that are left out."""
        left_out = (
            [cb.name for cb in regularizers_of(self._trainer) if isinstance(cb, ActivityPenalty)] if self._trainer else []
        )
        reason = "because its gradient needs a separate backward pass"
        return [*super().notes(), *(f"{self.name} does not measure {name}, {reason}" for name in left_out)]

    def route(self) -> str:
        """Return when it measures."""
        return f"every {self.every_n_steps} steps"
