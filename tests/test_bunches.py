"""That tensors come in bunches which a cache holds, whatever their shapes, and none is left out."""

from __future__ import annotations

import pytest
import torch

from lightning_reg import bunches as module
from lightning_reg.bunches import bunches


@pytest.fixture
def tensors():
    """Return small and large tensors, in order and not, of few long rows and of several dtypes."""
    torch.manual_seed(0)
    shapes = [(3, 4), (70, 3), (1, 200), (2, 100), (), (0, 5), (64,), (65,), *[(5,)] * 40]
    plain = [torch.randn(shape) for shape in shapes]
    return [*plain, torch.randn(30, 10).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), plain[1].half()]


@pytest.mark.parametrize("precise", [False, True])
def test_each_entry_comes_once_and_lies_beside_its_own(tensors, precise, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", 64)
    beside = [tensor.clone() for tensor in tensors]
    for source, room, parts, others in bunches(tensors, beside, precise=precise):
        assert source.numel() <= 64 or not source.is_contiguous()
        assert room.dtype == (torch.promote_types(others[0].dtype, torch.float32) if precise else others[0].dtype)
        torch.mul(source, 2, out=room)
        for part, other in zip(parts, others, strict=True):
            other.add_(part)
    assert all(torch.equal(other, 3 * tensor) for other, tensor in zip(beside, tensors, strict=True))
