"""The language example as a user runs it, shortened, in one process and with shards in two."""

from __future__ import annotations

import re

import language_transformer as example
import matplotlib.image
import pytest
from processes import ROOT, run_script

SCRIPT = str(ROOT / "examples" / "language_transformer.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run the example with few epochs in a terminal of 80 columns; return the folder and the output."""
    folder = tmp_path_factory.mktemp("job")
    return folder, run_script(SCRIPT, "--epochs", "1", "--repeats", "3", folder=folder, columns=80)


def losses(printed):
    """Return the losses in the last column of a table, as text."""
    return re.findall(r"│ +(nan|\d\.\d{6}) │", printed)


def test_candidates_have_rows(job):
    table = job[1].partition("One batch")[0]
    assert re.findall(r"^([a-z][a-z ]+?)  +\d\.\d+ ± \d", table, re.MULTILINE) == list(example.CANDIDATES)
    assert max(map(len, job[1].splitlines())) <= 80


def test_one_batch_ruins_the_run_unless_guarded(job):
    good, ruined, guarded, left_out = losses(job[1])
    assert ruined == "nan"
    assert guarded == left_out != good
    assert "The weights of the last two runs are equal, bit for bit" in job[1]
    assert job[1].count("NonFiniteGradientGuard: 1 step skipped") == 1


def test_figure_is_drawn(job):
    folder, printed = job
    figure = folder / re.search("Figure: (.*)", printed)[1]
    assert matplotlib.image.imread(figure)[..., :3].std() > 0.05


@pytest.mark.slow
def test_sharded_training_equals_one_process(tmp_path):
    """The guard skips the batch in both processes. Without callbacks and on good data, the loss is another."""
    printed = run_script(SCRIPT, "--fsdp", "--epochs", "1", folder=tmp_path, columns=80)
    one, two = (float(loss) for loss in re.findall(r"│ (\d\.\d{6}) │", printed))
    assert abs(one - two) <= example.TOLERANCE
    held = [int(number.replace(",", "")) for number in re.findall(r"│ (\d+,\d+) +│", printed)]
    assert held[0] / 2 == pytest.approx(held[1], rel=0.01)
    plain = example.train([], "", 1).callback_metrics["val/loss"]
    assert abs(one - plain) > 100 * example.TOLERANCE


def test_splits_share_no_text():
    """A topic is in one part only, and the topics share no window."""
    data = example.Topics(0)
    training, validation = ({tuple(window.tolist()) for window in part.tensors[0]} for part in (data.training, data.validation))
    assert not training & validation
    assert 0.15 < len(validation) / len(training) <= 0.25
    assert {tuple(window.tolist()) for window in example.Topics(1).validation.tensors[0]} != validation


def test_tokens_spell_the_text():
    """No character is lost: rare words are spelled."""
    texts, size = example.corpus()
    assert max(map(max, texts)) < size == len({token for text in texts for token in text})
