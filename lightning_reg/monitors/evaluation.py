"""Evaluates a metric on a sample with the module's own ``validation_step``, and leaves no trace."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torchmetrics import Metric

from lightning_reg._engine import _evaluation, _lightning
from lightning_reg._engine.arguments import close_matches
from lightning_reg._engine.names import class_name
from lightning_reg.monitors.attributes import state_restored
from lightning_reg.monitors.isolation import empty, own_random_numbers, untouched
from lightning_reg.monitors.statistics import estimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_reg._engine._evaluation import Logged
    from lightning_reg.monitors.attributes import Attributes
    from lightning_reg.monitors.samples import Sample

_ROUNDING = 1e-4  # the largest relative difference of two means that rounding explains


class Measured(NamedTuple):
    """A metric on a sample.

    Args:
        metric: The name of the metric.
        value: The metric over the whole sample, on all ranks.
        values: The metric of each batch, on all ranks; empty if it is not a mean over samples.
        weights: The sizes of the batches.
    """

    metric: str
    value: float
    values: list[float]
    weights: list[float]


def measure(
    trainer: Trainer, pl_module: LightningModule, sample: Sample, metric: str | None, data: str, most: int | None = None
) -> Measured:
    """Evaluate a metric on a sample; every rank must call it.

    Args:
        trainer: The trainer of the fit.
        pl_module: Its module.
        sample: The sample.
        metric: A name that ``validation_step`` logs, or ``None`` for the only one that contains "loss".
        data: The name of the sampled data, for error messages.
        most: The number of batches to stop after; all by default.

    Raises:
        ValueError: If the metric is not logged, or if ``validation_step`` keeps something in attributes.
        RuntimeError: If ``validation_step`` fails.
    """
    results = _Results()
    random_numbers = own_random_numbers(trainer.strategy.root_device, sample.source)
    data_kept = state_restored(sample.source)
    with torch.no_grad(), warnings.catch_warnings(), random_numbers, data_kept, untouched(pl_module) as attributes:
        warnings.simplefilter("ignore")  # validation has already shown them, unless only small batches raise them
        for index, (batch, size) in enumerate(sample.batches()):
            if index == most:
                break
            logged = _run_step(trainer, pl_module, batch, index, data)
            _check_kept(pl_module, attributes)
            metric = metric_name(list(logged), metric, f"{class_name(pl_module)}.validation_step")
            if metric not in logged:
                raise ValueError(
                    f"validation_step does not log {metric!r} for batch {index} of the {data}: log it in each batch"
                )
            results.add(logged[metric], size)
            if not results.accumulates:
                empty(pl_module)
        if metric is None or not results.entries:
            raise ValueError(f"the sample of the {data} has no batches")
        return results.over_ranks(trainer, metric)


class _Results:
    """The values that the batches of a sample have logged."""

    def __init__(self) -> None:
        self.entries: list[Logged] = []
        self.weights: list[float] = []
        self._values: list[Tensor] = []
        self._states: list[dict[str, Any]] = []

    @property
    def accumulates(self) -> bool:
        """Whether a metric's state must accumulate over batches, because the metric cannot merge states."""
        last = self.entries[-1].value if self.entries else None
        return isinstance(last, Metric) and (last.full_state_update is not False or last.dist_sync_on_step)

    def add(self, entry: Logged, size: int) -> None:
        """Add the value that a batch has logged."""
        self.entries.append(entry)
        self.weights.append(float(entry.size or size))
        value = entry.value
        if not isinstance(value, Metric):
            self._values.append(torch.as_tensor(value).detach())
        elif not self.accumulates:
            self._values.append(_compute(value, across_ranks=False))
            self._states.append(dict(value.metric_state))

    def over_ranks(self, trainer: Trainer, metric: str) -> Measured:
        """Return the metric over all batches of all ranks."""
        last = self.entries[-1]
        whole = self._merged(last.value) if isinstance(last.value, Metric) else None
        values = torch.stack([value.double().cpu() for value in self._values]) if self._values else torch.zeros(0)
        of_ranks = _evaluation.over_ranks(trainer, torch.stack([values.double(), torch.tensor(self.weights[: len(values)])]))
        different = of_ranks[:: _lightning.tensor_parallel_size(trainer)]  # the others have evaluated the same samples
        numbers, weights = different.transpose(0, 1).reshape(2, -1).tolist()
        if whole is None and last.is_mean:
            return Measured(metric, estimate(numbers, weights).mean, numbers, weights)
        value = float(whole) if whole is not None else float(_reduced(torch.tensor(numbers), last.reduce))
        is_mean = bool(numbers) and whole is not None and _is_close(estimate(numbers, weights).mean, value)
        return Measured(metric, value, numbers if is_mean else [], weights)

    def _merged(self, metric: Metric) -> Tensor:
        """Return a metric over all batches of all ranks. It still holds the state of the last batch, or of all of them."""
        for name, value in (self._states[-1] if self._states else {}).items():
            setattr(metric, name, value)
        metric._update_count = max(metric._update_count, 1)
        for state in self._states[:-1]:
            metric.merge_state(state)
        return _compute(metric, across_ranks=True)


def _compute(metric: Metric, *, across_ranks: bool) -> Tensor:
    """Return the value of a metric in its current state."""
    metric._computed = None
    metric._to_sync = across_ranks and metric.sync_on_compute
    value = torch.as_tensor(metric.compute()).detach()
    metric._computed = None
    return value


def _reduced(values: Tensor, reduce: Any) -> Tensor:
    """Reduce the values of all batches as Lightning does, if the reduction is not the mean."""
    function = getattr(torch, reduce) if isinstance(reduce, str) else reduce
    return torch.as_tensor(function(values))


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDING * max(abs(other), 1e-8) or (math.isnan(one) and math.isnan(other))


_FOR_BOTH = (
    "The monitor uses it for both samples, so training batches must look like validation batches. If they differ, pass samples "
    "that do not: samples={'train': <DataLoader>, 'val': <DataLoader>}"
)


def _run_step(trainer: Trainer, pl_module: LightningModule, batch: Any, index: int, data: str) -> dict[str, Logged]:
    """Return what ``validation_step`` logs for a batch."""
    with _evaluation.recorded_logs(trainer, pl_module) as logged:
        try:
            _evaluation.validation_step(trainer, batch, index)
        except Exception as error:
            hint = "" if data.startswith("validation") else f". {_FOR_BOTH}"
            what = f"{class_name(pl_module)}.validation_step failed on a batch of the {data}"
            raise RuntimeError(f"{what} ({type(error).__name__}: {error}){hint}") from error
    return logged


def _check_kept(pl_module: LightningModule, attributes: Attributes) -> None:
    """Raise an error if the step collects outputs in attributes, where the monitor's own batches must not end up."""
    if kept := attributes.kept():
        names = ", ".join(f"self.{name}" for name in kept)
        raise ValueError(
            f"{class_name(pl_module)}.validation_step collects something in {names}, where the monitor's own batches must not "
            "end up. Log the value in validation_step with self.log(...), or keep outputs in a torchmetrics metric, such as "
            "torchmetrics.CatMetric(), whose state the monitor saves and restores"
        )


def metric_name(logged: Sequence[str], metric: str | None, step: str) -> str:
    """Return the name of the metric among the logged names.

    Args:
        logged: What the step logs.
        metric: The wanted name, or ``None`` for the only one that contains "loss".
        step: The name of the step that logs, for error messages.

    Raises:
        ValueError: If it is not logged, or if no name or several names contain "loss".

    Example:
        >>> metric_name(["val/loss", "val/accuracy"], None, "Model.validation_step")
        'val/loss'
        >>> metric_name(["val/loss", "val/accuracy"], "val/acuracy", "Model.validation_step")
        Traceback (most recent call last):
        ValueError: Model.validation_step does not log 'val/acuracy'. Close names: val/accuracy, val/loss
    """
    if not logged:
        raise ValueError(f"{step} logs nothing: log the metric in it, as in self.log('val/loss', loss). {_AT_THE_END}")
    if metric is None:
        return _only_loss(logged, step)
    for name in (metric, metric.removesuffix("_epoch"), metric.removesuffix("_step")):
        if name in logged:
            return name
    hint = "" if _is_similar(metric, logged) else f". {_AT_THE_END}"
    raise ValueError(f"{step} does not log {metric!r}. Close names: {close_matches(metric, logged)}{hint}")


_AT_THE_END = (
    "What on_validation_epoch_end logs cannot be measured on a sample: log the torchmetrics metric itself in validation_step, "
    "as in self.log('val/accuracy', self.accuracy)"
)


def _is_similar(metric: str, logged: Iterable[str]) -> bool:
    """Return whether a name may be a misspelling of one that is logged."""
    return any(close_matches(metric, [name], shown=["-"]) == name for name in logged)


def _only_loss(logged: Sequence[str], step: str) -> str:
    losses = [name for name in logged if "loss" in name.lower()]
    if len(losses) == 1:
        return losses[0]
    found = f"logs {', '.join(losses)}" if losses else f"logs no name with 'loss', but {', '.join(logged)}"
    raise ValueError(f"{step} {found}: choose one, as in metric={(losses or list(logged))[0]!r}")
