"""Running figures of a regularizer: kept as device tensors, read when something is logged or saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchmetrics import Metric

__all__ = ["Figures"]

Then: TypeAlias = Callable[[Tensor], Tensor]
"""From the values of many steps to their figures."""

_PENDING = 256
"""How many numbers wait before they enter a metric, which costs more than to keep them."""


def _itself(values: Tensor) -> Tensor:
    return values


class Figures:
    """Averages over the steps since they were read last, and counts over the whole fit.

    Example:
        >>> figures = Figures()
        >>> for clipped in (0.0, 1.0):
        ...     figures.average("clipped", torch.tensor(clipped))
        >>> dict(figures.take())
        {'clipped': tensor(0.5000)}
    """

    def __init__(self) -> None:
        self._pending: dict[str, list[Tensor]] = {}
        self._metrics: dict[str, Metric] = {}
        self._then: dict[str, Then] = {}

    def average(self, key: str, value: Tensor, then: Then = _itself) -> None:
        """Add a step's figure to an average, which begins anew once it is taken.

        Args:
            key: The name of the figure.
            value: What is known of this step.
            then: What makes the figures of the values of many steps: done when they are read, which saves work in each step.
        """
        self._add("MeanMetric", key, value, then)

    def count(self, key: str, value: Tensor, then: Then = _itself) -> None:
        """Add a step's figure, the same on every rank, to a sum over the fit."""
        self._add("SumMetric", key, value, then)

    def _add(self, kind: str, key: str, value: Tensor, then: Then) -> None:
        if key not in self._metrics:
            self._metrics[key] = _KINDS[kind]()
        self._then[key] = then
        pending = self._pending.setdefault(key, [])
        pending.append(value)
        if len(pending) >= _PENDING:
            self._flush()

    def to(self, device: torch.device) -> None:
        """Move what a checkpoint brought to the device of the run."""
        for metric in self._metrics.values():
            metric.to(device)

    def _flush(self) -> None:
        for key, pending in self._pending.items():
            device = pending[0].device
            values = torch.stack([value.to(device) for value in pending])
            self._metrics[key].to(device).update(self._then[key](values).float())
        self._pending.clear()

    def take(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what has come together, reduced over the ranks, and begin the averages anew."""
        self._flush()
        for key, metric in self._updated():
            yield key, metric.compute()
            if isinstance(metric, MeanMetric):
                metric.reset()

    def _updated(self) -> list[tuple[str, Metric]]:
        return [(key, metric) for key, metric in self._metrics.items() if metric.update_called]

    def clear(self) -> None:
        """Begin everything anew."""
        self._pending.clear()
        self._metrics.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on."""
        self._flush()
        return {key: {"kind": type(metric).__name__, "state": metric.state_dict()} for key, metric in self._updated()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        self.clear()
        for key, saved in state.items():
            self._metrics[key] = _KINDS[saved["kind"]]()
            self._metrics[key].load_state_dict(saved["state"])
            self._metrics[key].update(torch.zeros(0))  # which adds nothing, but tells the metric that it has something


def _mean() -> Metric:
    metric = MeanMetric(nan_strategy="disable")  # to look for NaN would wait for the device
    metric.persistent(True)
    return metric


def _sum() -> Metric:
    metric = SumMetric(nan_strategy="disable", sync_on_compute=False)  # the same on every rank
    metric.persistent(True)
    return metric


_KINDS: dict[str, Callable[[], Metric]] = {"MeanMetric": _mean, "SumMetric": _sum}
