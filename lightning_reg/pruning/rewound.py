"""Pruning that rewinds the weights to an early step after each pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning_reg._engine.arguments import check_integer
from lightning_reg.pruning import rewinding
from lightning_reg.pruning.masked import MaskedRegularizer
from lightning_reg.pruning.timing import late_rewinding_message

if TYPE_CHECKING:
    from collections.abc import Container

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_reg._engine.clock import Clock
    from lightning_reg._engine.plan import Step
    from lightning_reg._engine.selection import Params


class RewindingRegularizer(MaskedRegularizer):
    """Base class of pruning that may rewind.

    Args:
        rewind_to_step: The number of optimizer steps to go back to, or ``None`` for no rewinding.
        params: The parameters to act on.
        name: The name in metrics and checkpoints.

    Raises:
        TypeError: If ``rewind_to_step`` is not an integer.
        ValueError: If it is negative.
    """

    fit_attributes: ClassVar[tuple[str, ...]] = ("_optimizer_states", "_saved")

    def __init__(self, rewind_to_step: int | None, params: Params, name: str | None) -> None:
        if rewind_to_step is not None:
            check_integer(f"{type(self).__name__}: rewind_to_step", rewind_to_step, 0)
        self.rewind_to_step = rewind_to_step
        super().__init__(params, name)
        self._optimizer_states: dict[int, dict[Any, Any]] = {}
        self._saved: set[int] = set()  # the ids of parameters whose values to rewind to are saved

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the parameters, and copy the initial state of the optimizers."""
        super().attach(trainer, pl_module)
        self._optimizer_states = {} if self.rewind_to_step is None else rewinding.initial_states(trainer.optimizers)

    def resolve(self, clock: Clock) -> None:
        """Save the weights if the start of the fit is the step to rewind to."""
        super().resolve(clock)
        if self.rewind_to_step == 0:
            self._save_start()

    def before_batch(self) -> None:
        """Save parameters that were frozen at the step to rewind to, and reset the optimizers if they have not stepped since.

        A checkpoint of sharded parameters cannot hold optimizers without state, so torch takes a step on zeros to save them.
        """
        if self._state.is_fresh:
            self._reset_optimizers()
        if not self._state.start or self._trainer is None:
            return
        trained = rewinding.trained_ids(self._trainer.lightning_module, self._trainer.optimizers)
        if trained != self._saved:
            self._saved = trained
            self._state.start = {**rewinding.snapshot(self._rewindable(self._state.start)), **self._state.start}

    def step_end(self, step: Step, done: int) -> bool:
        """Save the weights if this is the step to rewind to."""
        changed = super().step_end(step, done)
        self._state.is_fresh = False
        if self._state.steps == self.rewind_to_step:
            self._save_start()
        return changed

    def rewind(self) -> None:
        """Set trained parameters, statistics of batch normalization, and optimizers back.

        Raises:
            ValueError: If the step to rewind to has not been taken yet.
        """
        if self.rewind_to_step is None:
            return
        assert self._trainer is not None, "attached"
        if not self._state.start:
            raise ValueError(late_rewinding_message(self.name, self.rewind_to_step, f"{self._state.steps} steps"))
        rewound = self._rewindable()
        rewinding.restore_(rewound, self._state.start)
        for tensor in rewound.values():
            tensor.grad = None  # it belongs to other weights
        self._state.is_fresh = True
        self._reset_optimizers()

    def _reset_optimizers(self) -> None:
        assert self._trainer is not None, "attached"
        rewinding.reset_optimizers_(self._trainer.optimizers, self._optimizer_states)
        self._clear_states()

    def detach(self) -> None:
        """Release the tensors."""
        super().detach()
        self._optimizer_states.clear()
        self._saved.clear()

    def _save_start(self) -> None:
        """Save the tensors to rewind to, unless an earlier fit or a checkpoint has done so."""
        self._state.start = self._state.start or rewinding.snapshot(self._rewindable())

    def _rewindable(self, without: Container[str] = ()) -> dict[str, Tensor]:
        assert self._trainer is not None, "attached"
        tensors = rewinding.rewindable(self._trainer.lightning_module, self._trainer.optimizers)
        return {name: tensor for name, tensor in tensors.items() if name not in without}
