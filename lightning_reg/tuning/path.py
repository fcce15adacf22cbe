"""How strong? One technique at several strengths, and the strongest one that is about as good as the best."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_reg._engine.arguments import check_choice, check_integer, described_value
from lightning_reg.tuning.files import described_callbacks
from lightning_reg.tuning.progress import progress_bar
from lightning_reg.tuning.results import Runs, decimals, known_overlap, mean_and_deviation, mean_seconds
from lightning_reg.tuning.runs import check_splits, checked_run, measure, shared_settings
from lightning_reg.tuning.statistics import one_standard_error, standard_error
from lightning_reg.tuning.storage import open_storage, open_study
from lightning_reg.tuning.techniques import smaller_is_stronger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    from lightning.pytorch import Callback, LightningModule
    from matplotlib.figure import Figure

    from lightning_reg.tuning.experiment import Data, Mode, Run
    from lightning_reg.tuning.storage import Outcome, Storage


@dataclass(kw_only=True)
class StrengthPath(Runs):
    """The result of `strength_path`.

    Attributes:
        callbacks: The technique with the chosen strength.
        argument: The varied argument.
        values: The strengths, in increasing order.
        best: The strength with the best mean.
        choice: The strongest value whose mean is within one standard error of the best.
        failed: The strengths at which a run failed. These are never chosen.
    """

    argument: str
    values: list[float]
    best: float
    choice: float
    failed: list[float] = field(default_factory=list)

    def summary(self) -> str:
        """Return the result in one sentence."""
        return f"{self.argument}={self.choice:g} is the strongest within one standard error of the best, {self.best:g}"

    def curve(self, part: str = "value") -> list[tuple[float, float]]:
        """Return the mean and the standard error at each strength.

        Args:
            part: ``"value"`` for the validation data, ``"training"`` for the training data.
        """
        return [mean_and_error([getattr(run, part) for run in self.runs[repr(value)]]) for value in self.values]

    def table(self) -> Table:
        """Return a table with a row for each strength."""
        table = Table(title=f"{self.metric} over {len(self.splits)} splits", caption=self.summary(), box=SIMPLE_HEAD)
        for column in (self.argument, "Validation ± sd", "Standard error", "Training", "s", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for value, (_, error), (training, _) in zip(self.values, self.curve(), self.curve("training"), strict=True):
            runs = self.runs[repr(value)]
            shown = f"{training:.{decimals(error)}f}" if math.isfinite(training) else ""
            table.add_row(f"{value:g}", mean_and_deviation(runs), f"{error:.2g}", shown, mean_seconds(runs), self._mark(value))
        return table

    def _mark(self, value: float) -> str:
        marks = ["best"] * (value == self.best) + ["chosen"] * (value == self.choice) + ["failed"] * (value in self.failed)
        return ", ".join(marks)

    def figure(self) -> Figure:
        """Draw the metric against the strength, for validation and training data, with bands of one standard error."""
        from lightning_reg.tuning.figures import draw_path

        return draw_path(self)


def strength_path(
    model: Callable[[], LightningModule] | None,
    data: Data | None,
    technique: Callable[..., Callback],
    argument: str,
    *,
    values: Sequence[float],
    metric: str = "value",
    mode: Mode = "min",
    repeats: int = 5,
    stronger: Literal["larger", "smaller"] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    overlap: float | None = None,
    storage: Storage = None,
    name: str = "path",
    run: Run | None = None,
    progress: bool = True,
) -> StrengthPath:
    """Train one technique at several strengths, and choose the strongest one that is about as good as the best.

    The choice follows the one-standard-error rule: it takes the strongest value whose mean is within one standard error of the
    best mean. This determines how strong the technique should be, not whether it helps. For that, use `compare`.

    Args:
        model: Function that returns a new model. ``None`` with ``run``.
        data: Function that returns the data of a split: a ``LightningDataModule``, or a training and a validation loader.
            ``None`` with ``run``.
        technique: A callback class, or a function with one keyword argument that returns a callback, such as
            ``functools.partial(DropoutInjection, after="ReLU")``.
        argument: The argument to vary, such as ``"strength"``.
        values: At least two values, in any order. A log grid such as ``[1e-5, 1e-4, 1e-3]`` suits strengths.
        metric: A metric that the model logs in validation. Its value after the last epoch counts.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.
        repeats: Number of splits, at least 3.
        stronger: Whether ``"larger"`` or ``"smaller"`` values regularize more. By default, larger ones, except for bounds such
            as ``max_norm`` and ``clip_value``.
        trainer: Arguments of the Trainer. By default, it has no logger, checkpoints, progress bar, or summary.
        seed: The run of split i is seeded with ``seed + i``.
        overlap: Validation samples divided by training samples. By default, the runs count the samples.
        storage: URL of a database that stores the runs. By default, nothing is stored.
        name: Name of the study in the database.
        run: Function ``(callbacks, split, seed) -> float`` to use instead of a model, data, and a Trainer. Requires
            ``overlap``.
        progress: Whether to show a progress bar.

    Returns:
        The curve, the best strength, and the one to use.

    Raises:
        ValueError: If an argument is out of range, the metric is not logged, ``data`` ignores the split, or a stored study was
            made with other settings.
        TypeError: If an argument has the wrong type.
        RuntimeError: If three runs in a row fail, or a run failed at every strength.

    Example:
        >>> from random import Random
        >>> from lightning_reg import L2Penalty
        >>> def run(callbacks, split, seed):  # instead of training: best at 1e-3
        ...     return (math.log10(callbacks[0].strength) + 3) ** 2 + Random(f"{callbacks}{seed}").gauss(0, 0.5)
        >>> grid = [1e-5, 1e-4, 1e-3, 1e-2]
        >>> path = strength_path(None, None, L2Penalty, "strength", values=grid, run=run, overlap=0.25, progress=False)
        >>> path.best, path.callbacks
        (0.001, [L2Penalty(0.001)])

    Reference:
        J. Friedman, T. Hastie, R. Tibshirani, "Regularization Paths for Generalized Linear Models via Coordinate
        Descent", 2010.
    """
    check_integer("repeats", repeats, 3)
    grid = checked_values(values)
    candidates = {repr(value): [made(technique, argument, value)] for value in grid}
    larger = is_larger(argument, stronger)
    run = checked_run(model, data, metric, mode, trainer, seed, overlap, None, run, training=True)
    splits = list(range(repeats))
    check_splits(run, splits)
    described = {key: described_callbacks(callbacks) for key, callbacks in candidates.items()}
    settings = {"candidates": described, **shared_settings(metric, seed, overlap, trainer), "repeats": repeats}
    shown = progress_bar("Path", len(candidates) * repeats, mode, progress)
    with open_storage(storage) as opened, shown as report:
        study = open_study(opened, name, mode, settings)
        runs = measure(study, run, list(candidates), candidates.__getitem__, splits, seed, report)
    best, choice = chosen(grid, [runs[repr(value)] for value in grid], mode, larger)
    return StrengthPath(
        callbacks=candidates[repr(choice)],
        metric=metric,
        mode=mode,
        overlap=known_overlap(overlap, runs),
        runs=runs,
        splits=splits,
        argument=argument,
        values=grid,
        best=best,
        choice=choice,
        failed=[value for value in grid if any(run.error for run in runs[repr(value)])],
    )


def chosen(values: Sequence[float], runs: Sequence[Sequence[Outcome]], mode: Mode, larger: bool) -> tuple[float, float]:
    """Return the best value, and the strongest within one standard error of it.

    Args:
        values: The values, in increasing order.
        runs: The runs of each value.
        mode: Whether lower or higher metrics are better.
        larger: Whether larger values regularize more.

    Raises:
        RuntimeError: If a run failed at every value.
    """
    sign = 1 if mode == "max" else -1
    scores = {
        value: [sign * run.value for run in of_value]
        for value, of_value in zip(values, runs, strict=True)
        if not any(run.error for run in of_value)
    }
    if not scores:
        reason = next(run.error for run in runs[-1] if run.error)
        raise RuntimeError(f"a run failed at every value; one of them:\n{reason}")
    ordered = sorted(scores, reverse=larger)  # from the strongest to the weakest
    best = max(ordered, key=lambda value: fmean(scores[value]))
    return best, ordered[one_standard_error([scores[value] for value in ordered])]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard error of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return (finite[0] if finite else math.nan), math.nan
    return fmean(finite), standard_error(finite, overlap=0)


def checked_values(values: Sequence[float]) -> list[float]:
    """Return distinct values in increasing order.

    Raises:
        ValueError: If there are fewer than two, or one is not finite.
    """
    grid = sorted({float(value) for value in values})
    if len(grid) < 2 or not all(map(math.isfinite, grid)):
        raise ValueError(f"values must be at least two distinct finite numbers, got {list(values)}")
    return grid


def made(technique: Callable[..., Callback], argument: str, value: float) -> Callback:
    """Return the callback with one strength.

    Raises:
        ValueError: If the technique refuses the value or the argument.
        TypeError: If it is neither a callback class nor a function.
    """
    if not callable(technique):
        raise TypeError(f"technique must be a callback class, as in L2Penalty, got {described_value(technique)}")
    try:
        return technique(**{argument: value})
    except (TypeError, ValueError) as error:
        name = getattr(technique, "__name__", repr(technique))
        raise type(error)(f"{name}({argument}={value:g}): {error}") from error


def is_larger(argument: str, stronger: str | None) -> bool:
    """Return whether larger values regularize more."""
    if stronger is None:
        return not smaller_is_stronger(argument)
    check_choice("stronger", stronger, ("larger", "smaller"))
    return stronger == "larger"
