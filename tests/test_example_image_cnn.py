"""The example of a CNN in a short form, and what it says of its data and of pruning."""

from __future__ import annotations

import re

import matplotlib.image
import pytest
from processes import ROOT, run_script

pytest.importorskip("mlxtend", reason="mlxtend needs Python 3.11")

import image_cnn


@pytest.mark.slow
def test_example_prints_table_and_draws_figure(tmp_path):
    flags = ["--epochs=3", "--repeats=3"]
    printed = run_script(str(ROOT / "examples" / "image_cnn.py"), *flags, folder=tmp_path, columns=80)
    names = list(image_cnn.candidates())
    assert re.findall(rf"^ *({'|'.join(names)}) +\d", printed, re.MULTILINE) == names
    assert max(map(len, printed.splitlines())) <= 80
    assert "Warning" not in printed
    assert re.search(r"^total +90\.00%  95,400 of 106,000$", printed, re.MULTILINE)
    path = re.findall(r"^Figure: (.*)$", printed, re.MULTILINE)[0]
    assert matplotlib.image.imread(tmp_path / path)[..., :3].std() > 0.05


def test_splits_are_disjoint_and_differ():
    splits = [image_cnn.Images(split) for split in (0, 1)]
    training, validation = (set(part.indices) for part in (splits[0].training, splits[0].validation))
    assert (len(training), len(validation)) == (1000, 250)
    assert training.isdisjoint(validation)
    assert set(splits[1].validation.indices) != validation


def test_only_pruning_sets_weights_to_zero():
    found = {name: image_cnn.train(callbacks, epochs=3)[1].pruned for name, callbacks in image_cnn.candidates().items()}
    assert [name for name, pruned in found.items() if pruned[-1] > 1] == ["pruned to 90%", "both"]
    assert found["both"][-1] == pytest.approx(90, abs=1e-3)
    assert found["both"] == sorted(found["both"])
