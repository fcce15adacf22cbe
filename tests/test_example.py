"""The examples as a user runs them, from another folder: the main job without arguments, the others shortened."""

from __future__ import annotations

import re

import digits
import matplotlib.image
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from processes import HERE, run_script
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run the example and return the folder and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    return folder, run_script(str(HERE.parent / "examples" / "digits.py"), folder=folder, threads=2, columns=200)


def test_regularization_helps(job):
    """As a mean over the seeds: a smaller gap, and at least the test accuracy of the plain model."""
    figures = {
        line.split("│")[1].strip(): [float(number) for number in re.findall(r"([\d.]+)% ±", line)]
        for line in job[1].splitlines()
        if line.startswith(("│ plain", "│ regularized"))
    }
    (plain_train, plain_test, plain_gap, _), (train, test, gap, _) = figures["plain"], figures["regularized"]
    assert plain_gap == pytest.approx(plain_train - plain_test, abs=0.11)
    assert gap == pytest.approx(train - test, abs=0.11)
    assert gap < plain_gap
    assert test >= plain_test


def test_it_leaves_curves_and_logs_and_says_where(job):
    folder, printed = job
    assert "Curves: runs/digits/curves.png" in printed
    assert "tensorboard --logdir runs/digits" in printed
    image = matplotlib.image.imread(folder / "runs/digits/curves.png")
    assert image[..., :3].std() > 0.05  # something is drawn
    for kind in ("plain", "regularized"):
        logs = (folder / "runs/digits" / kind).glob("seed_*/events.out.tfevents.*")
        assert {log.parent.name for log in logs} == {f"seed_{seed}" for seed in range(5)}


def test_it_shows_its_progress_and_what_acts(job):
    assert "Epoch 99" in job[1]
    assert job[1].count("Regularization") == 1
    assert "DropoutInjection-ReLU" in job[1]


def labels_of(data):
    """Return the labels that the data module gives, and whether each is for training."""
    data.setup("fit")
    trained = torch.zeros(1797, dtype=torch.bool)
    trained[data.training.indices] = True
    return data.training.dataset.tensors[1], trained


def test_label_noise_changes_training_labels_only():
    right = torch.tensor(load_digits().target)
    labels, trained = labels_of(digits.Digits(seed=1))
    assert trained.sum() == 300
    assert torch.equal(labels[~trained], right[~trained])
    assert 70 <= (labels != right).sum() <= 90  # of the 90 that are drawn, one in ten is right by chance
    assert torch.equal(labels, labels_of(digits.Digits(seed=1))[0])
    assert not torch.equal(labels, labels_of(digits.Digits(seed=2))[0])
    assert torch.equal(labels_of(digits.Digits(label_noise=0.0))[0], right)


def test_data_of_every_allowed_size():
    for samples in (10, 1487):
        data = digits.Digits(train_samples=samples)
        data.setup("fit")
        assert (len(data.training), len(data.validation), len(data.testing)) == (samples, 300, 1497 - samples)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("label_noise=1.5", r"Digits: label_noise must be in \[0, 1\], got 1.5"),
        ("label_noise=-0.1", r"Digits: label_noise must be in \[0, 1\], got -0.1"),
        ("label_noise=.nan", r"Digits: label_noise must be in \[0, 1\], got nan"),
        ("train_samples=9", r"Digits: train_samples must be in \[10, 1487\], got 9"),
        ("train_samples=1488", r"Digits: train_samples must be in \[10, 1487\], got 1488"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter is intended")
def test_bad_values_of_the_data_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        LightningCLI(digits.DigitsClassifier, digits.Digits, args=[f"--data.{flag}"], run=False, seed_everything_default=0)


def test_schedules_of_dropout_are_compared(tmp_path):
    script = str(HERE.parent / "examples" / "dropout_schedules.py")
    printed = run_script(script, "--epochs=4", "--seeds=2", folder=tmp_path, columns=200)
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ["none", "constant", "early", "late"]
    losses = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in printed.splitlines() if line.startswith("│")}
    assert len(set(losses.values())) == 4  # no two schedules came to the same
    assert "Curves: runs/dropout_schedules/curves.png" in printed
    assert matplotlib.image.imread(tmp_path / "runs/dropout_schedules/curves.png")[..., :3].std() > 0.05


def test_the_pruning_curve_is_drawn(tmp_path):
    """In short form; that magnitude beats chance at 80 % is seen after few epochs already."""
    flags = ["--epochs=6", "--seeds=2", f"--output={tmp_path}"]
    printed = run_script(str(HERE.parent / "examples" / "pruning_curve.py"), *flags, folder=tmp_path, columns=200)
    accuracies = {
        int(line.split("│")[1].strip().rstrip("%")): [float(number) for number in re.findall(r"([\d.]+)% ±", line)]
        for line in printed.splitlines()
        if "% ±" in line
    }
    assert list(accuracies) == [0, 50, 80, 90, 95, 98]
    magnitude, at_random = accuracies[80]
    assert magnitude > at_random + 5
    assert accuracies[0][0] == accuracies[0][1] > accuracies[98][0]
    assert "curve.png" in printed
    assert matplotlib.image.imread(tmp_path / "curve.png")[..., :3].std() > 0.05
