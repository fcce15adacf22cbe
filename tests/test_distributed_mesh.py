"""FSDP2 over tensor parallelism on a 2×2 mesh of four ranks, compared with one process."""

from __future__ import annotations

import pytest
import torch
from mesh_worker import layer, values
from processes import run_script
from torch.distributed.tensor import Partial

from lightning_reg._tensors.shards import divides


def test_norms_and_penalties_count_all_shards(two_ranks, tmp_path):
    run_script(*two_ranks("mesh_worker.py", ranks=4), str(tmp_path), timeout=300)
    expected = values(list(layer().parameters()))
    for rank in range(4):
        placements, found = torch.load(tmp_path / f"{rank}.pt")
        assert "_StridedShard" in placements
        assert found == pytest.approx(expected, rel=1e-5)


def test_unknown_placement_is_refused_by_name():
    with pytest.raises(TypeError, match="Partial"):
        divides(Partial())
