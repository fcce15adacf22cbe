"""The tabular example in a short form, and what it says of its splits and its models."""

from __future__ import annotations

import re

import matplotlib.image
import numpy as np
import pytest
import tabular
from processes import ROOT, run_script
from sklearn.datasets import load_breast_cancer, load_diabetes

from lightning_reg import L2Penalty


@pytest.mark.slow
def test_example_prints_table_and_draws_figure(tmp_path):
    flags = ["--epochs=2", "--trials=3", "--confirm=3", "--repeats=3"]
    printed = run_script(str(ROOT / "examples" / "tabular.py"), *flags, folder=tmp_path, columns=80)
    models = re.findall(r"^.*?(plain|chosen|boosting) +\d\.\d+ ± \d", printed, re.MULTILINE)
    assert models == ["plain", "chosen", "boosting"] * 2
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert "Warning" not in printed
    assert len(re.findall(r"(tumors|diabetes): choose (took|kept)", printed)) == 2
    path = re.findall(r"^Figure: (.*)$", printed, re.MULTILINE)[0]
    assert matplotlib.image.imread(tmp_path / path)[..., :3].std() > 0.05


@pytest.fixture(params=[2, 1], ids=["classes", "numbers"])
def data(request):
    return tabular.Patients(*(load_breast_cancer if request.param == 2 else load_diabetes)(return_X_y=True), request.param)


def test_choose_sees_no_test_patient(data):
    seen, tested = set(), set()
    for split in range(40):
        seen |= {*np.concatenate(data.inner(split))}
        train, test = data.outer(split)
        tested |= {*test}
        assert {*train}.isdisjoint(test)
        assert len(train) + len(test) == len(data.y)
        assert len(test) / len(train) == pytest.approx(0.25, abs=0.01)
    assert seen.isdisjoint(tested)
    assert tested == {*data.reserved}
    assert not np.array_equal(data.outer(0)[1], data.outer(1)[1])


def test_models_and_boosting_meet_the_same_splits(data):
    """A strong penalty changes the perceptron only, and without callbacks the chosen one is plain."""
    kept = tabular.measure(data, [], range(2), epochs=1)
    strong = tabular.measure(data, [L2Penalty(1.0)], range(2), epochs=1)
    assert kept["chosen"] == kept["plain"] == strong["plain"] != strong["chosen"]
    assert kept["boosting"] == strong["boosting"]


def test_gain_is_positive_for_lower_loss_and_plain_may_be_kept():
    losses = {"plain": [3.0, 4.0, 5.0], "boosting": [2.0, 2.5, 4.5]}
    losses["chosen"] = losses["plain"]
    assert tabular.gain(losses, "boosting", "plain").mean == 1.0
    assert tabular.gain(losses, "plain", "boosting").mean == -1.0
    assert tabular.in_words(losses, "chosen", "plain") == "is plain"
    assert tabular.in_words(losses, "plain", "plain") == ""
