"""Buffers of a module, such as running statistics, as they were before a batch made some of them non-finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lightning_reg._tensors.shards import local_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn


class _Saved(NamedTuple):
    buffer: Tensor
    version: int
    value: Tensor


class BufferHistory:
    """The floating-point buffers of a module before each batch of an optimizer step.

    A buffer that no batch changes is copied once.

    Args:
        module: The module whose buffers to watch.

    Example:
        >>> norm = torch.nn.BatchNorm1d(1)
        >>> history = BufferHistory(norm)
        >>> history.record(begins_step=True)
        >>> _ = norm(torch.tensor([[1.0], [float("nan")]]))
        >>> history.restore_nonfinite()
        ['running_mean', 'running_var']
        >>> norm.running_mean
        tensor([0.])
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (f"{prefix}.{name}" if prefix else name, owner, name)
            for prefix, owner in module.named_modules()
            for name, buffer in owner.named_buffers(recurse=False)
            if buffer.is_floating_point() or buffer.is_complex()
        ]
        self._saved: dict[str, list[_Saved]] = {}

    @torch.no_grad()
    def record(self, *, begins_step: bool) -> None:
        """Copy what has changed since the last batch; the first batch of a step forgets the last step's."""
        for label, owner, name in self._places:
            buffer = owner._buffers.get(name)
            if buffer is None:
                continue
            saved = self._saved.get(label, [])
            is_same = bool(saved) and saved[-1].buffer is buffer and saved[-1].version == buffer._version
            if begins_step:
                saved = saved[-1:] if is_same else []
            self._saved[label] = saved if is_same else [*saved, _Saved(buffer, buffer._version, buffer.clone())]

    @torch.no_grad()
    def restore_nonfinite(self) -> list[str]:
        """Give buffers that a batch of this step made non-finite their values from before it, and return their names."""
        restored = []
        for label, owner, name in self._places:
            buffer, saved = owner._buffers.get(name), self._saved.get(label)
            if buffer is None or not saved or not _is_spoilt(buffer, saved[0].value):
                continue
            good = next(entry for entry in reversed(saved) if not _is_spoilt(entry.value, saved[0].value))
            if buffer.shape == good.value.shape:
                buffer.copy_(good.value)
            else:
                owner._buffers[name] = good.value.clone()
            restored.append(label)
        return restored


def _is_spoilt(buffer: Tensor, before: Tensor) -> bool:
    """Return whether entries that were finite are not finite any more; a buffer may hold infinities on purpose."""
    now, then = local_tensor(buffer), local_tensor(before)
    if now.shape != then.shape:
        return not bool(now.isfinite().all())
    return bool((then.isfinite() & ~now.isfinite()).any())
