"""Access to Lightning's loops beyond their documented interface, to evaluate batches outside of them."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_reg._engine import _lightning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


_WITH_INDEX = 2  # arguments of a step: the batch and its index


class Logged(NamedTuple):
    """A value that a step has logged under a name.

    Args:
        value: A number, a tensor, or a torchmetrics metric.
        size: The batch size that was passed, if any.
        reduce: How to reduce the values of batches to that of an epoch: a name in torch, or a function.
    """

    value: Any
    size: int | None
    reduce: Any

    @property
    def is_mean(self) -> bool:
        """Whether the value of an epoch is the mean over its batches."""
        return self.reduce in ("mean", torch.mean)


class Record(dict[str, Any]):
    """Replaces the collection in which a Lightning loop keeps logged values."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.batch: Any = None
        self.batch_size: int | None = None
        self.dataloader_idx: int | None = None
        self.logged: dict[str, Logged] = {}

    def log(
        self, fx: str, name: str, value: Any, *, reduce_fx: Any = "mean", batch_size: int | None = None, **options: Any
    ) -> None:
        """Keep a value."""
        self.logged[name] = Logged(value, batch_size, reduce_fx)

    def reset(self, *args: Any, **options: Any) -> None:
        """Keep everything."""


@contextmanager
def recorded_logs(trainer: Trainer, pl_module: LightningModule) -> Iterator[dict[str, Logged]]:
    """Let the module log as in ``validation_step``, but into the yielded dictionary instead of loggers."""
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    connector: Any = trainer._logger_connector
    module: Any = pl_module
    before = loop._results, connector._current_fx, module._current_fx_name, trainer.loggers, trainer.state.stage
    record = loop._results = Record()
    module._current_fx_name = "validation_step"
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]
    trainer.validating = True
    try:
        yield record.logged
    finally:
        loop._results, connector._current_fx, module._current_fx_name, trainer.loggers, trainer.state.stage = before


def validation_step(trainer: Trainer, batch: Any, batch_idx: int) -> None:
    """Move a batch to the device with the module's and the data module's own hooks, and run ``validation_step`` on it."""
    module: Any = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    trainer.strategy.validation_step(batch, *_indices(module.validation_step, batch_idx))


def _indices(step: Callable[..., Any], batch_idx: int) -> tuple[int, ...]:
    """Return the required arguments of a step after the batch."""
    parameters = inspect.signature(step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < _WITH_INDEX and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    names_loader = len(positional) > _WITH_INDEX and positional[_WITH_INDEX].default is inspect.Parameter.empty
    return (batch_idx, 0) if names_loader else (batch_idx,)


def fetches_its_batches(pl_module: LightningModule) -> bool:
    """Return whether ``validation_step`` takes an iterator instead of a batch."""
    return "dataloader_iter" in inspect.signature(pl_module.validation_step).parameters


def has_validation_data(trainer: Trainer) -> bool:
    """Return whether the fit validates, as far as is known before the data are loaded."""
    return trainer.limit_val_batches != 0 and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()


def training_data(trainer: Trainer) -> Any:
    """Return the loader of the training data as the module gave it, or several of them."""
    return trainer.train_dataloader


def validation_data(trainer: Trainer) -> Any:
    """Return the loader of the validation data as the module gave it, or several of them; ``None`` if not loaded yet."""
    return trainer.val_dataloaders


def is_last_validation(trainer: Trainer) -> bool:
    """Return whether the current validation is the last one of its epoch, as far as can be known."""
    loop = trainer.fit_loop.epoch_loop
    if _lightning.stops_early(trainer) or _lightning.ends_epoch(trainer) or loop._is_training_done:
        return True
    if getattr(trainer, "_val_check_time_interval", None) is not None or trainer.num_training_batches == float("inf"):
        return True  # a later one of the same epoch replaces this one
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    interval = trainer.val_check_batch
    left = min(trainer.num_training_batches - loop.batch_idx - 1, _batches_left(trainer))
    return (done + 1) // interval == (done + 1 + left) // interval  # type: ignore[operator]


def _batches_left(trainer: Trainer) -> float:
    """Return the number of batches until ``max_steps`` ends the fit."""
    if trainer.max_steps == -1 or not trainer.lightning_module.automatic_optimization:
        return float("inf")
    return (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches


def log_now(trainer: Trainer, keys: Sequence[str], values: Tensor) -> None:
    """Log metrics at once, as Lightning logs its own, and make them available to callbacks.

    Only a logger needs them on the CPU.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    if trainer.loggers:
        metrics = dict(zip(keys, values.tolist(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)
    values = values.to(trainer.strategy.root_device, torch.get_default_dtype())
    available = trainer._logger_connector._callback_metrics  # asking for them in public would compute the module's own
    available.update(zip(keys, values.unbind(), strict=True))


def over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the tensors of all ranks, stacked in a new dimension 0. Every rank must call it with the same shape."""
    if trainer.world_size == 1:
        return tensor[None]
    gathered: Tensor = trainer.strategy.all_gather(tensor.to(trainer.strategy.root_device))
    return gathered.reshape(trainer.world_size, *tensor.shape)


def least(trainer: Trainer) -> Callable[[int], int]:
    """Return a function that returns the minimum of a number over all ranks. Every rank must call it."""
    return lambda number: int(over_ranks(trainer, torch.tensor(number)).min())


def log_directory(trainer: Trainer) -> Path | None:
    """Return the directory of the first logger that has one, if any. Every rank must call it."""
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    directory = trainer.log_dir
    return Path(directory) if isinstance(directory, (str, Path)) and str(directory) else None


def tensorboards(trainer: Trainer) -> list[Any]:
    """Return the loggers that write for TensorBoard."""
    return [logger for logger in trainer.loggers if _lightning.is_instance_of(logger, "TensorBoardLogger")]
