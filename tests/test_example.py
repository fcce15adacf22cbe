"""The examples as a user runs them, from another folder. The main example runs in full, the others are shortened."""

from __future__ import annotations

import re
import subprocess
import sys

import digits
import matplotlib.image
import pytest
import rich.console
import torch
from lightning.pytorch.cli import LightningCLI
from processes import ROOT, environment, run_script
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits

TECHNIQUES = ["L1Penalty", "L2Penalty", "DropoutInjection", "GradientNormClipping", "WeightClipping"]
NOTICES = ["available:", "Tip:", "many workers", "deprecated", "Warning", "fit` stopped", "Seed set"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run the example in a terminal of 80 columns; return the folder and the output."""
    folder = tmp_path_factory.mktemp("job")
    command = [sys.executable, str(ROOT / "examples" / "digits.py")]
    with (folder / "printed").open("w") as printed:
        process = subprocess.run(
            command, env=environment(columns=80), cwd=folder, stdout=printed, stderr=subprocess.STDOUT, timeout=600, check=False
        )
    text = (folder / "printed").read_text()
    assert process.returncode == 0, text[-3000:]
    return folder, text


def rows(printed):
    """Return the cells of the results table, by candidate."""
    lines = [line.split("│")[1:-1] for line in printed.rpartition("random labels, mean")[2].splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if len(cells) == 5}


def numbers(cell):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell)]


def test_regularization_gains_ten_points(job):
    results = rows(job[1])
    points, low, high = numbers(results["all five"][1])
    assert points >= 10
    assert 5 < low < points < high
    assert points == pytest.approx(numbers(results["all five"][0])[0] - numbers(results["plain"][0])[0], abs=0.11)
    assert numbers(results["plain"][2])[0] > 99  # memorized the wrong labels
    assert numbers(results["all five"][2])[0] < 90


def test_every_technique_has_a_row(job):
    results = rows(job[1])
    assert list(results) == ["plain", *TECHNIQUES, "all five"]
    assert results.pop("plain")[1] == ""
    for cells in results.values():
        points, low, high = numbers(cells[1])
        assert low < points < high


def test_table_fits_80_columns(job):
    assert max(map(len, job[1].splitlines())) <= 80
    assert "…" not in job[1]


def test_table_fits_80_columns_on_slow_machine(capsys):
    runs = {name: [digits.Run(0.888, 1.0, 123.4, [])] * 2 for name in [digits.PLAIN, *TECHNIQUES, digits.ALL]}
    rich.console.Console(width=80).print(digits.table(runs))
    printed = capsys.readouterr().out
    assert "123 s" in printed
    assert "…" not in printed


def test_output_names_figure_and_logs(job):
    folder, printed = job
    assert "Figure: runs/digits/digits.png" in printed
    assert "tensorboard --logdir runs/digits" in printed
    assert re.search("^plain: over-fits since epoch \\d+: ", printed, re.MULTILINE)  # what OverfittingMonitor says
    for curves in ("all_five/version_0/all_five.png", "plain/version_0/plain.png"):
        assert matplotlib.image.imread(folder / "runs/digits" / curves)[..., :3].std() > 0.05
        assert f"Overfitting: runs/digits/{curves}" in printed
    image = matplotlib.image.imread(folder / "runs/digits/digits.png")
    assert image[..., :3].std() > 0.05  # not blank
    logs = {log.parent.relative_to(folder / "runs/digits") for log in folder.rglob("events.out.tfevents.*")}
    assert {str(log) for log in logs} == {"plain/version_0", "all_five/version_0"}
    assert sorted(path.name for path in folder.iterdir()) == ["printed", "runs"]
    assert not list(folder.rglob("*.ckpt"))


def test_output_shows_progress_and_one_summary(job):
    assert [int(process) for process in re.findall(r"Trained (\d+) of 70 models", job[1])] == [10, 20, 30, 40, 50, 60, 70]
    assert job[1].count("Regularization") == 1
    assert "clip_value=0.1" in job[1]


def test_lightning_notices_are_silenced(job):
    assert [notice for notice in NOTICES if notice in job[1]] == []


def test_interval_matches_paired_t_test():
    accuracies, plain = torch.tensor([[0.88, 0.86, 0.91, 0.87], [0.75, 0.77, 0.74, 0.70]]).double()
    runs = [[digits.Run(test, 0.0, 0.0, []) for test in tests.tolist()] for tests in (accuracies, plain)]
    points, low, high = digits.gain(*runs)
    expected = ttest_rel(100 * accuracies, 100 * plain).confidence_interval(0.95)
    assert points == pytest.approx(100 * (accuracies - plain).mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))
    narrow = ttest_rel(accuracies, plain).confidence_interval(0.8)
    interval = digits.mean_interval((accuracies - plain).tolist(), level=0.8)
    assert interval[1:] == pytest.approx((narrow.low, narrow.high))
    assert digits.mean_interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_run_depends_only_on_seed(monkeypatch):
    """It does not depend on what the process trained before."""
    monkeypatch.setattr(digits, "EPOCHS", 2)
    alone = digits.train("all five", 3)
    others = [digits.train("DropoutInjection", 3), digits.train("all five", 4)]
    again = digits.train("all five", 3)
    assert (again.test, again.train, again.history) == (alone.test, alone.train, alone.history)
    assert all(other.history != alone.history for other in others)


def labels_of(data):
    """Return the labels of the data module, and a mask of the training samples."""
    data.setup("fit")
    trained = torch.zeros(1797, dtype=torch.bool)
    trained[data.training.indices] = True
    return data.training.dataset.tensors[1], trained


def test_label_noise_changes_training_labels_only():
    true_labels = torch.tensor(load_digits().target)
    labels, trained = labels_of(digits.Digits(seed=1))
    assert trained.sum() == 300
    assert torch.equal(labels[~trained], true_labels[~trained])
    assert 70 <= (labels != true_labels).sum() <= 90  # 90 are drawn, and one in ten is right by chance
    assert torch.equal(labels, labels_of(digits.Digits(seed=1))[0])
    assert not torch.equal(labels, labels_of(digits.Digits(seed=2))[0])
    assert torch.equal(labels_of(digits.Digits(label_noise=0.0))[0], true_labels)


def test_smallest_and_largest_training_set():
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
def test_bad_data_arguments_raise(flag, message):
    with pytest.raises(ValueError, match=message):
        LightningCLI(digits.DigitsClassifier, digits.Digits, args=[f"--data.{flag}"], run=False, seed_everything_default=0)


@pytest.mark.slow
def test_dropout_schedules_example(tmp_path):
    script = str(ROOT / "examples" / "dropout_schedules.py")
    printed = run_script(script, "--epochs=4", "--seeds=2", folder=tmp_path, columns=200)
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ["none", "constant", "early", "late"]
    losses = {line.split("│")[1].strip(): line.split("│")[4].strip() for line in printed.splitlines() if line.startswith("│")}
    assert len(set(losses.values())) == 4  # all schedules differ
    assert "Curves: runs/dropout_schedules/curves.png" in printed
    assert matplotlib.image.imread(tmp_path / "runs/dropout_schedules/curves.png")[..., :3].std() > 0.05


@pytest.mark.slow
def test_pruning_curve_example(tmp_path):
    """Shortened. A few epochs show that magnitude beats random pruning at 80%."""
    flags = ["--epochs=6", "--seeds=2", f"--output={tmp_path}"]
    printed = run_script(str(ROOT / "examples" / "pruning_curve.py"), *flags, folder=tmp_path, columns=200)
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


@pytest.mark.slow
def test_choose_digits_example(tmp_path):
    """Shortened. The same command goes on, and the file that it writes trains."""
    script, flags = str(ROOT / "examples" / "choose_digits.py"), ["--trials=6", "--confirm=3", "--epochs=3"]
    printed = run_script(script, *flags, folder=tmp_path, columns=200)
    assert "claimed by the best of 6 trials" in printed
    assert run_script(script, *flags, folder=tmp_path, columns=200) == printed
    folder = tmp_path / "runs" / "choose_digits"
    assert matplotlib.image.imread(folder / "choice.png")[..., :3].std() > 0.05
    fit = ["fit", f"--config={folder / 'reg.yaml'}", "--trainer.max_epochs=1", "--trainer.logger=false"]
    run_script(str(ROOT / "examples" / "digits.py"), *fit, folder=tmp_path)
