"""Chunks cover each entry of each tensor exactly once, for any shapes."""

from __future__ import annotations

import pytest
import torch

from lightning_reg._tensors import chunks
from lightning_reg._tensors.chunks import batched_chunks, list_chunks


@pytest.fixture
def tensors():
    """Return small and large tensors, contiguous or not, some with few long rows, of several dtypes."""
    torch.manual_seed(0)
    shapes = [(3, 4), (70, 3), (1, 200), (2, 100), (), (0, 5), (64,), (65,), *[(5,)] * 40]
    plain = [torch.randn(shape) for shape in shapes]
    return [*plain, torch.randn(30, 10).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), plain[1].half()]


@pytest.mark.parametrize("accumulate", [False, True])
def test_chunks_cover_each_entry_once(tensors, accumulate, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 64)
    others = [tensor.clone() for tensor in tensors]
    for source, buffer, views, chunk_others in batched_chunks(tensors, others, accumulate=accumulate):
        assert source.numel() <= 64 or not source.is_contiguous()
        dtype = chunk_others[0].dtype
        assert buffer.dtype == (torch.promote_types(dtype, torch.float32) if accumulate else dtype)
        torch.mul(source, 2, out=buffer)
        for view, other in zip(views, chunk_others, strict=True):
            other.add_(view)
    assert all(torch.equal(other, 3 * tensor) for other, tensor in zip(others, tensors, strict=True))


def test_lists_cover_each_entry_once(tensors, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 64)
    others = [tensor.clone() for tensor in tensors]
    lists = [[*pair] for pair in list_chunks(tensors, others)]
    for parts, other_parts in lists:
        entries = sum(part.numel() for part in parts)
        assert entries <= 64 or (len(parts) == 1 and not parts[0].is_contiguous())
        torch._foreach_add_(other_parts, parts, alpha=2)
    assert len(lists) < len(tensors)
    assert all(torch.equal(other, 3 * tensor) for other, tensor in zip(others, tensors, strict=True))
    assert not list(list_chunks([], []))
