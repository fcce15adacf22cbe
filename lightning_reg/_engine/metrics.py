"""Running metrics of a technique: sums on the device, read only when something is logged or saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class RunningMetrics:
    """Metrics by name. Means restart when they are read. Sums continue over the whole fit.

    Their values are equal on every rank, so reading them needs no communication. Each step adds one number to one tensor.
    Updating a torchmetrics metric would cost more than clipping itself on a small model.

    Example:
        >>> import torch
        >>> running = RunningMetrics()
        >>> for clipped in (False, True):
        ...     running.mean("clipped_steps", torch.tensor(clipped))
        >>> dict(running.compute_and_reset())
        {'clipped_steps': tensor(0.5000)}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def mean(self, key: str, value: Tensor) -> None:
        """Add a value of this step to a mean over the steps since it was last read."""
        self.sum(key, value)
        self._steps[key] = self._steps.get(key, 0) + 1

    def sum(self, key: str, value: Tensor) -> None:
        """Add a value of this step to a sum over the fit."""
        before = self._sums.get(key)
        self._sums[key] = value.float() if before is None else before.to(value.device) + value

    def compute_and_reset(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of every metric, and reset the means."""
        for key in list(self._sums):
            if key in self._steps:
                yield key, self._sums.pop(key) / self._steps.pop(key)
            else:
                yield key, self._sums[key]

    def reset(self) -> None:
        """Forget everything."""
        self._sums.clear()
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, or an empty dictionary."""
        sums = {key: value.cpu() for key, value in self._sums.items()}
        return {"sums": sums, "steps": dict(self._steps)} if sums else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another run stopped."""
        self._sums, self._steps = dict(state.get("sums", {})), dict(state.get("steps", {}))
