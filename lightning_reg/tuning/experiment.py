"""One run: train a new model with some callbacks on one split of the data, and return one metric."""

from __future__ import annotations

import copy
import logging
import math
import signal
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_reg._engine.arguments import close_matches, described_value
from lightning_reg._engine.regularizer import Regularizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lightning.pytorch import Callback

Mode: TypeAlias = Literal["min", "max"]
Loaders: TypeAlias = "LightningDataModule | tuple[Any, Any]"
Data: TypeAlias = "Callable[[int], Loaders]"
Run: TypeAlias = "Callable[[Sequence[Callback], int, int], float]"
"""The foundation of everything else: ``run(callbacks, split, seed)`` returns the value of one run."""

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Default Trainer arguments of a run."""


class SetupError(ValueError):
    """The call is wrong, so no run can succeed."""


class Measured(float):
    """The value of a run, and its other measurements.

    Attributes:
        training: The same metric on the training data, or NaN if it was not requested.
        overlap: Validation samples divided by training samples, or NaN if a size is unknown.
    """

    training: float = math.nan
    overlap: float = math.nan


class TrainerRun:
    """Train a new model with a Trainer of its own, and return the metric after the last epoch.

    Args:
        model: Function that returns a new model.
        data: Function that returns the data of a split: a ``LightningDataModule``, or a training and a validation loader.
        metric: Name of a metric in ``trainer.callback_metrics`` after ``fit``, such as ``"val/loss"``.
        trainer: Arguments of the Trainer. By default, it has no logger, checkpoints, progress bar, or summary. Its
            ``callbacks`` are part of every run.
        training: Whether to measure the metric on the training data too, in evaluation mode after the fit.
        overlap: Validation samples divided by training samples. By default, each run counts its samples.

    Raises:
        TypeError: If ``model``, ``data``, ``metric``, or ``trainer`` has the wrong type.
    """

    def __init__(
        self,
        model: Callable[[], LightningModule],
        data: Data,
        metric: str,
        trainer: Mapping[str, Any] | None = None,
        training: bool = False,
        overlap: float | None = None,
    ) -> None:
        if isinstance(model, LightningModule) or not callable(model):
            raise TypeError(f"model must be a function that returns a new model, got {described_value(model)}: write lambda: …")
        if isinstance(data, LightningDataModule) or not callable(data):
            raise TypeError(f"data must be a function of the split, got {described_value(data)}: write lambda split: …")
        if not isinstance(metric, str):
            raise TypeError(f"metric must be the name of a metric, as in 'val/loss', got {described_value(metric)}")
        if isinstance(trainer, Trainer):
            raise TypeError(
                'trainer must be a mapping of Trainer arguments, as in {"max_epochs": 30}: each run creates its own Trainer'
            )
        self.model, self.data, self.metric, self.training, self.overlap = model, data, metric, training, overlap
        self.trainer = {**QUIET, **(trainer or {})}

    def __call__(self, callbacks: Sequence[Callback], split: int, seed: int) -> Measured:
        """Train with copies of the callbacks on a split, with all random numbers seeded, and return the metric.

        Raises:
            SetupError: If the model does not log the metric.
            KeyboardInterrupt: If the run was interrupted.
        """
        with isolate_rng(), quiet():
            seed_everything(seed, verbose=False)
            model, data = self.model(), self.data(split)
            trainer = Trainer(**{**self.trainer, "callbacks": fresh([*self._own_callbacks(), *callbacks])})
            fit(trainer, model, data)
            value = self._value(trainer)
            measured = Measured(trainer.strategy.broadcast(value))
            measured.overlap = self._overlap(trainer)
            if self.training:
                measured.training = self._training_value(trainer, model)
        return measured

    def check_data(self, splits: Sequence[int]) -> None:
        """Raise an error if two splits have the same validation data.

        Raises:
            SetupError: If the first validation batches of two splits are equal.
        """
        if len(splits) < 2:
            return
        with isolate_rng(), quiet():
            first, second = (first_validation_batch(self.data(split)) for split in splits[:2])
        if first and len(first) == len(second) and all(map(torch.equal, first, second)):
            raise SetupError(
                f"data({splits[0]}) and data({splits[1]}) have the same validation data: data must use its argument, "
                "the number of the split, to split the samples differently (for example, as the seed of the split)"
            )

    def _own_callbacks(self) -> list[Callback]:
        given = self.trainer.get("callbacks") or []
        return list(given) if isinstance(given, (list, tuple)) else [given]

    def _value(self, trainer: Trainer) -> float:
        metrics = trainer.callback_metrics
        if self.metric not in metrics:
            close = close_matches(self.metric, metrics) or "none"
            raise SetupError(f"the model did not log the metric {self.metric!r}; it logged: {close}")
        return float(metrics[self.metric])

    def _overlap(self, trainer: Trainer) -> float:
        counted = overlap_of(trainer) if self.overlap is None else self.overlap
        if math.isnan(counted):
            raise SetupError(
                "the sizes of the training and validation data are unknown: pass overlap=, the number of validation samples "
                "divided by the number of training samples, or overlap=0 if each split is fresh data"
            )
        return counted

    def _training_value(self, trainer: Trainer, model: LightningModule) -> float:
        trainer.validate(model, unshuffled(trainer.train_dataloader), verbose=False)
        return float(trainer.callback_metrics.get(self.metric, math.nan))


def fit(trainer: Trainer, model: LightningModule, data: Loaders) -> None:
    """Fit, and raise ``KeyboardInterrupt`` if the user interrupts it, which Lightning turns into an exit or a normal end."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        if isinstance(data, LightningDataModule):
            trainer.fit(model, datamodule=data)
        else:
            trainer.fit(model, *checked_pair(data))
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from here on
        raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def checked_pair(data: Any) -> tuple[Any, Any]:
    """Return a training and a validation loader.

    Raises:
        SetupError: If the data are neither a pair nor a ``LightningDataModule``.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise SetupError(
            "data must return a LightningDataModule, or a training loader and a validation loader, "
            f"but returned {described_value(data)}"
        )
    return data[0], data[1]


def fresh(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return copies of callbacks, without the state of earlier fits."""
    copies = copy.deepcopy(list(callbacks))
    for callback in copies:
        if isinstance(callback, Regularizer):
            callback.reset()
    return copies


def overlap_of(trainer: Trainer) -> float:
    """Return validation samples divided by training samples of a fit, or NaN if a size is unknown."""
    train = samples(trainer.train_dataloader, [trainer.num_training_batches])
    val = samples(trainer.val_dataloaders, trainer.num_val_batches)
    return val / train if train and val else math.nan


def samples(loaders: Any, batches: Sequence[float]) -> float:
    """Return how many samples an epoch takes from loaders, or NaN if that is unknown."""
    flat = [leaf for leaf in tree_leaves(loaders) if leaf is not None]
    limits = list(batches) if len(batches) == len(flat) else [batches[0]] * len(flat) if batches else []
    return sum(map(_samples, flat, limits)) if flat else math.nan


def _samples(loader: Any, batches: float) -> float:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return math.nan
    sampler: Any = loader.sampler if hasattr(loader.batch_sampler, "sampler") else loader.dataset
    if not hasattr(sampler, "__len__"):
        return math.nan
    size = getattr(loader.batch_sampler, "batch_size", None)
    return min(float(len(sampler)), batches * size) if isinstance(size, int) else float(len(sampler))


def unshuffled(loader: Any) -> Any:
    """Return a loader of the same samples in order, so that Lightning does not warn about a shuffled evaluation."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    return DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def first_validation_batch(data: Loaders) -> list[torch.Tensor]:
    """Return the tensors of the first validation batch, unshuffled."""
    if isinstance(data, LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        loader = data.val_dataloader()
    else:
        loader = checked_pair(data)[1]
    while isinstance(loader, (list, tuple)):
        loader = loader[0]
    batch = next(iter(unshuffled(loader)), None)
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off Lightning's messages about each of many runs. Show each warning once, not in each run."""
    with warnings.catch_warnings(record=True) as caught, _quiet_loggers():
        warnings.filterwarnings("ignore", message=r".*LeafSpec|.*does not have many workers")
        yield
    for warning in caught:
        if (shown := (warning.category, str(warning.message))) not in _SHOWN:
            _SHOWN.add(shown)
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


_SHOWN: set[tuple[type[Warning], str]] = set()


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logging.WARNING, logger.level))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
