"""Running metrics of a technique: kept on the device, and read only when something is logged or saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchmetrics import MeanMetric, SumMetric

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor


_KINDS: dict[str, type[MeanMetric | SumMetric]] = {"MeanMetric": MeanMetric, "SumMetric": SumMetric}


class RunningMetrics:
    """Metrics by name. Means start again when they are read; sums go on over the whole fit.

    Their values must be equal on every rank, so reading them needs no communication.

    Example:
        >>> import torch
        >>> running = RunningMetrics()
        >>> for clipped in (False, True):
        ...     running.mean("clipped_steps", torch.tensor(clipped))
        >>> dict(running.compute_and_reset())
        {'clipped_steps': tensor(0.5000)}
    """

    def __init__(self) -> None:
        self._metrics: dict[str, MeanMetric | SumMetric] = {}

    def mean(self, key: str, value: Tensor) -> None:
        """Add a value of this step to a mean over the steps since it was last read."""
        self._metric(key, "MeanMetric", value.device).update(value.float())

    def sum(self, key: str, value: Tensor) -> None:
        """Add a value of this step to a sum over the fit."""
        self._metric(key, "SumMetric", value.device).update(value.float())

    def _metric(self, key: str, kind: str, device: torch.device) -> MeanMetric | SumMetric:
        if key not in self._metrics:
            metric = _KINDS[kind](nan_strategy="disable", sync_on_compute=False)  # a search for NaN would wait for the device
            metric.persistent(True)
            self._metrics[key] = metric
        return self._metrics[key].to(device) if self._metrics[key].device != device else self._metrics[key]

    def compute_and_reset(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every sum, and of every mean that was updated; reset the means."""
        for key, metric in self._metrics.items():
            if isinstance(metric, SumMetric):
                yield key, metric.sum_value.clone()  # right after a resume compute() would warn that nothing was added yet
            elif metric.update_called:
                yield key, metric.compute()
                metric.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._metrics.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on."""
        return {key: {"kind": type(metric).__name__, "state": metric.state_dict()} for key, metric in self._metrics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stopped."""
        self.reset()
        for key, saved in state.items():
            self._metric(key, saved["kind"], next(iter(saved["state"].values())).device).load_state_dict(saved["state"])
