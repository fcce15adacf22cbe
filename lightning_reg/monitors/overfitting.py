"""Shows whether a fit overfits, by evaluating the same metric in the same way on training and validation data."""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from lightning_reg._engine import _evaluation, _lightning
from lightning_reg._engine.arguments import check_choice, check_integer, described_value
from lightning_reg._engine.names import class_name
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg._engine.state_checks import is_number
from lightning_reg._engine.technique import Phase
from lightning_reg.monitors.attributes import state_restored
from lightning_reg.monitors.curves import Point, point_of
from lightning_reg.monitors.evaluation import measure
from lightning_reg.monitors.figure import draw_curves
from lightning_reg.monitors.isolation import own_random_numbers
from lightning_reg.monitors.samples import DrawError, Given, sample_of
from lightning_reg.monitors.verdict import Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer

    from lightning_reg.monitors.evaluation import Measured
    from lightning_reg.monitors.samples import Sample

SAMPLES = 2048
"""The default number of samples to draw."""

_UNSAFE = r"[^\w.-]+"  # in the name of a file

_DATA = {"train": "training data", "val": "validation data"}


class OverfittingMonitor(Regularizer):
    """Measure the gap between training and validation data, with its uncertainty: gap = val − train.

    Runs in: ``on_validation_epoch_end``, at the last validation of an epoch.

    The usual comparison of ``train_loss`` and ``val_loss`` is biased: the training loss is measured with dropout,
    augmentation, and penalties, on weights that change during the epoch. This callback evaluates a fixed sample of the
    training data and one of the validation data in the same way. It uses the module's own ``validation_step`` in eval mode,
    the weights that were just validated, the loaders' collate functions, and the module's transfer hooks.

    It logs ``reg/<name>/train``, ``val``, ``gap`` (positive if the metric is worse on validation data), and the bounds of its
    95% interval, ``gap_low`` and ``gap_high``. They are in ``trainer.callback_metrics`` before any other callback reads it,
    even without a logger, so ``EarlyStopping(monitor="reg/OverfittingMonitor/gap")`` works anywhere in the list.
    It changes nothing: weights, logged metrics, torchmetrics states, modes, gradients, and random numbers are the same as
    without it. Random augmentations of a dataset are the same at each evaluation.
    The interval uses Student's t over small batches. A metric that is not a mean over samples, such as AUROC, has none.
    Each rank evaluates an equal share of the samples.
    When the fit ends, it prints ``verdict`` in one line. With a logger and matplotlib (``lightning-reg[plots]``), it saves
    ``figure()`` as ``<name>.png`` in the log directory, and shows it in TensorBoard.

    Args:
        metric: The name under which ``validation_step`` logs the metric. ``None`` takes the only name that contains "loss".
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        samples: The number of samples to draw from each dataset; all of them if it has fewer. If a dataset does not allow
            random draws, such as an ``IterableDataset``, pass a loader whose first 2048 samples replace the training data, or
            ``{"train": loader, "val": loader}``.
        every_n_epochs: Evaluate in the first validated epoch, and then once every n epochs.
        name: The name in metrics and checkpoints. The name of the class by default.

    Raises:
        ValueError: If there is no validation data or no ``validation_step``, the metric is not logged, no sample can be drawn,
            or ``validation_step`` keeps outputs in attributes of the module.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> monitor = OverfittingMonitor(metric="val/loss")
        >>> stop = EarlyStopping(monitor="reg/OverfittingMonitor/val", patience=3)
        >>> trainer = Trainer(callbacks=[stop, monitor], logger=False)

    Reference:
        B. L. Welch, "The generalization of Student's problem when several different population variances are involved", 1947.
    """

    phase = Phase.MONITOR
    state_entries = ("curves", "best")
    fit_attributes = ("_samples", "_trainer")
    deepspeed_alternative = None
    prints_always = True

    def __init__(
        self,
        *,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        samples: int | DataLoader[Any] | dict[str, DataLoader[Any]] = SAMPLES,
        every_n_epochs: int = 1,
        name: str | None = None,
    ) -> None:
        if not isinstance(metric, (str, type(None))):
            raise TypeError(f"OverfittingMonitor: metric must be the name of a logged metric, got {described_value(metric)}")
        check_choice("OverfittingMonitor: mode", mode, ("min", "max"))
        check_integer("OverfittingMonitor: every_n_epochs", every_n_epochs, 1)
        _check_samples(samples)
        self.metric = metric
        self.mode = mode
        self.samples = samples
        self.every_n_epochs = every_n_epochs
        super().__init__(name)
        self._samples: dict[str, Sample] = {}
        self._trainer: Trainer | None = None
        self._found = ""  # the name of the measured metric

    # Samples --------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to validate with."""
        module = class_name(pl_module)
        if not _lightning.overrides(pl_module, "validation_step"):
            raise ValueError(
                f"{self.name} evaluates with validation_step, but {module} has none: define one that logs the metric, as in "
                "self.log('val/loss', loss)"
            )
        if _evaluation.fetches_its_batches(pl_module):
            raise ValueError(
                f"{self.name}: {module}.validation_step(dataloader_iter) fetches its batches itself, so it cannot be given a "
                "sample: write validation_step(batch, batch_idx)"
            )
        if trainer.barebones:
            raise ValueError(f"{self.name} needs a fit that validates, but Trainer(barebones=True) does not: remove it")
        if trainer.limit_val_batches == 0:
            raise ValueError(f"{self.name} needs validation data, but limit_val_batches is 0: remove it, or set it to 1.0")
        if not _evaluation.has_validation_data(trainer):
            raise ValueError(
                f"{self.name} needs validation data, but there is no val_dataloader: pass some, as in trainer.fit(model, "
                "train_loader, val_loader)"
            )

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the trainer."""
        self._trainer = trainer

    def detach(self) -> None:
        """Release the samples and the trainer."""
        self._samples.clear()
        self._trainer = None

    def data_ready(self) -> None:
        """Draw the samples, and try a batch of each, so that mistakes surface before training."""
        assert self._trainer is not None, "the fit has started"
        trainer = self._trainer
        self._samples["train"] = self._sample(trainer, "train")
        if _evaluation.validation_data(trainer) is not None:
            self._samples["val"] = self._sample(trainer, "val")
        if not any(map(is_lazy, trainer.lightning_module.parameters())):
            for kind in self._samples:
                self._measure(trainer, kind, most=1)

    def _sample(self, trainer: Trainer, kind: str) -> Sample:
        parts = _lightning.tensor_parallel_size(trainer)  # ranks in a row that must see the same samples
        rank, ranks = trainer.global_rank // parts, trainer.world_size // parts
        given = self._given(kind)
        if given is not None:
            return Given(given, SAMPLES, rank, ranks)
        loader = _evaluation.training_data(trainer) if kind == "train" else _evaluation.validation_data(trainer)
        batches = trainer.num_training_batches if kind == "train" else math.inf
        samples = self.samples if isinstance(self.samples, int) else SAMPLES
        try:
            with own_random_numbers(trainer.strategy.root_device, loader), state_restored(loader):
                return sample_of(loader, samples, batches, rank=rank, ranks=ranks, least=_evaluation.least(trainer))
        except DrawError as error:
            example = "samples=<DataLoader>" if kind == "train" else "samples={'train': <DataLoader>, 'val': <DataLoader>}"
            raise ValueError(
                f"{self.name} cannot draw a sample of the {_DATA[kind]}: {error}. Pass one, as in {example}, with samples that "
                "are the same each time"
            ) from None

    def _given(self, kind: str) -> DataLoader[Any] | None:
        if isinstance(self.samples, dict):
            return self.samples.get(kind)
        return self.samples if kind == "train" and not isinstance(self.samples, int) else None

    # Evaluation -----------------------------------------------------------------------------------------------------

    @property
    def _sign(self) -> float:
        return 1.0 if self.mode == "min" else -1.0

    def validated(self) -> None:
        """Evaluate both samples, if it is time."""
        assert self._trainer is not None, "the fit has started"
        trainer = self._trainer
        if trainer.sanity_checking or not self._is_due(trainer.current_epoch) or not _evaluation.is_last_validation(trainer):
            return
        if "val" not in self._samples:
            self._samples["val"] = self._sample(trainer, "val")
        train, val = (self._measure(trainer, kind) for kind in ("train", "val"))
        self._note(point_of(trainer.current_epoch, train, val, self._sign, self._best_values()), val)
        metrics = self._metrics()
        _evaluation.log_now(trainer, list(metrics), torch.tensor(list(metrics.values()), dtype=torch.float64))

    def expected_in_state(self, entry: str, key: Any, value: Any) -> str:
        """Describe a valid entry: the point of an epoch, or the values of the best epoch."""
        if entry == "best":
            is_right = is_number(value) if key == "val" else key == "values" and _are_numbers(value)
            return "" if is_right else "the values of the best epoch"
        fewest = len(Point._fields) - len(Point._field_defaults)
        is_point = isinstance(key, int) and _are_numbers(value) and fewest <= len(value) <= len(Point._fields)
        return "" if is_point else "the numbers of an epoch"

    def _is_due(self, epoch: int) -> bool:
        last = max(self.state["curves"], default=None)
        n = self.every_n_epochs
        return last is None or last == epoch or (epoch + 1) // n > (last + 1) // n

    def _measure(self, trainer: Trainer, kind: str, most: int | None = None) -> Measured:
        with self._named():
            measured = measure(trainer, trainer.lightning_module, self._samples[kind], self.metric, _DATA[kind], most)
        self._found = measured.metric
        return measured

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the callback's name before the text of errors."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        except RuntimeError as error:
            raise RuntimeError(f"{self.name}: {error}") from error.__cause__

    def _best_values(self) -> list[float]:
        """Return the values of the best epoch on the batches of the validation sample."""
        best: list[float] = self.state["best"].get("values", [])
        return best

    def _note(self, found: Point, val: Measured) -> None:
        """Add an epoch to the curves."""
        if not self.state["best"] or found.val < self.state["best"]["val"]:
            self.state["best"].update(val=found.val, values=val.values)
        self.state["curves"][found.epoch] = list(found)

    @property
    def points(self) -> list[Point]:
        """The curves so far, an entry for each evaluated epoch. Values of a metric to maximize have their sign changed."""
        return [Point(*values) for _, values in sorted(self.state["curves"].items())]

    @property
    def verdict(self) -> Verdict:
        """The verdict: under-fits, fits, over-fits since an epoch, diverges, or cannot tell; with advice on what to try."""
        return judge(self.points, self._sign, self.name)

    def _metrics(self) -> dict[str, float]:
        """Return the metrics of the last evaluated epoch."""
        last = self.points[-1]
        values = {"train": self._sign * last.train, "val": self._sign * last.val, "gap": last.gap}
        if not math.isnan(last.gap_margin):
            values |= {"gap_low": last.gap - last.gap_margin, "gap_high": last.gap + last.gap_margin}
        return {f"reg/{self.name}/{key}": value for key, value in values.items()}

    # Reports ---------------------------------------------------------------------------------------------------------

    def figure(self) -> Any:
        """Return a figure of the curves so far, as a ``matplotlib.figure.Figure``; ``figure.savefig("curves.png")`` saves it.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If no epoch has been evaluated.
        """
        if not self.points:
            raise ValueError(f"{self.name} has no curves: no epoch has been evaluated yet")
        return draw_curves(self.points, self._found or self.metric or "metric", self.verdict, self._sign)

    def fit_over(self) -> None:
        """Save the figure in the log directory, and hand it to TensorBoard."""
        assert self._trainer is not None, "the fit has not been torn down yet"
        trainer = self._trainer
        folder = _evaluation.log_directory(trainer)  # on every rank
        if not (self.points and trainer.is_global_zero and find_spec("matplotlib")):
            return
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.figure().savefig(folder / f"{re.sub(_UNSAFE, '_', self.name)}.png", dpi=150)
        except OSError as error:
            rank_zero_warn(f"{self.name} could not save its figure: {error}")  # the fit itself has succeeded
        for logger in _evaluation.tensorboards(trainer):
            logger.experiment.add_figure(f"reg/{self.name}", self.figure(), trainer.global_step)

    def fit_summary(self) -> str | None:
        """Return the verdict."""
        return str(self.verdict)

    def acts_on(self) -> str:
        """Return what the callback watches."""
        return "watches two samples"

    def route(self) -> str:
        """Return when the callback evaluates: after the validation."""
        return "after validation"


def _check_samples(samples: Any) -> None:
    """Raise an error unless samples are a number, a loader, or loaders for training and validation data."""
    if isinstance(samples, int):
        check_integer("OverfittingMonitor: samples", samples, 1)
        return
    loaders = samples if isinstance(samples, dict) else {"train": samples}
    if isinstance(samples, dict) and not (samples and samples.keys() <= {"train", "val"}):
        raise ValueError(
            f"OverfittingMonitor: samples must have the keys 'train' and 'val', got {', '.join(map(repr, samples))}"
        )
    for loader in loaders.values():
        if not isinstance(loader, DataLoader):
            raise TypeError(
                "OverfittingMonitor: samples must be an integer, a DataLoader, or "
                f"{{'train': <DataLoader>, 'val': <DataLoader>}}, got {described_value(loader)}"
            )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))
