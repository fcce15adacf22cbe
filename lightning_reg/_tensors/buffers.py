"""Good copies of a module's buffers, such as running statistics, from before a batch that made them non-finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_reg._tensors.shards import local_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

_SILENT = ("running_mean", "running_var")


@dataclass
class _Place:
    """A buffer in its module, and its last known good value."""

    module: nn.Module
    name: str
    seen: Tensor | None = None  # the tensor that was last checked, and its version
    version: int = -1
    good: Tensor | None = None

    @property
    def buffer(self) -> Tensor | None:
        return self.module._buffers.get(self.name)

    def may_have_changed(self) -> bool:
        """Return whether the tensor or its version has changed. Torch's batch norm does not increase the version."""
        buffer = self.buffer
        silent = self.name in _SILENT
        return buffer is not None and (silent or buffer is not self.seen or buffer._version != self.version)

    def note(self) -> None:
        """Remember that the current value has been checked."""
        self.seen = self.buffer
        self.version = -1 if self.seen is None else self.seen._version


class GoodBuffers:
    """The floating-point buffers of a module, as they were before the last batch that may have made them non-finite.

    A buffer that no batch changes is copied only once. Nothing waits for the device until buffers are restored.

    Args:
        module: The module whose buffers to watch.

    Example:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> buffers = GoodBuffers(norm)
        >>> buffers.record(trusted=True)
        >>> _ = norm(torch.tensor([[1.0], [float("nan")]]))
        >>> buffers.restore()
        >>> norm.running_mean
        tensor([0.])
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            _Place(owner, name)
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and (buffer.is_floating_point() or buffer.is_complex())
        ]

    @torch.no_grad()
    def record(self, *, trusted: bool) -> None:
        """Record the buffers before a batch.

        Args:
            trusted: Whether a guard has checked the batches so far. If not, a buffer that is no longer finite keeps its last
                good value.
        """
        for place in self._places:
            if not place.may_have_changed():
                continue
            buffer, good = place.buffer, place.good
            assert buffer is not None, "it may have changed"
            if good is None or good.shape != buffer.shape:
                place.good = buffer.clone()
            elif trusted:
                good.copy_(buffer)
            else:
                good.copy_(torch.where(_is_spoiled(buffer, good), good, buffer))
            place.note()

    @torch.no_grad()
    def restore(self) -> None:
        """Reset buffers that are no longer finite to their last good value."""
        for place in self._places:
            buffer, good = place.buffer, place.good
            if buffer is not None and good is not None and buffer.shape == good.shape and place.may_have_changed():
                buffer.copy_(torch.where(_is_spoiled(buffer, good), good, buffer))


def _is_spoiled(buffer: Tensor, good: Tensor) -> Tensor:
    """Return whether entries that were finite no longer are. A buffer may hold infinities on purpose."""
    now, then = local_tensor(buffer), local_tensor(good)
    return (then.isfinite() & ~now.isfinite()).any()
