"""The examples as a user runs them, from another folder. The main example runs in full, the others are shortened."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import digits
import matplotlib.image
import pytest
import torch
from helpers import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from processes import ROOT, environment, run_script
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TECHNIQUES = ["L1 penalty", "L2 penalty", "dropout", "norm clipping", "weight clipping"]
NOTICES = ["available:", "Tip:", "many workers", "deprecated", "Warning", "fit` stopped", "Seed set"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run the example in a terminal of 80 columns; return the folder and the output."""
    folder = tmp_path_factory.mktemp("job")
    command = [sys.executable, str(ROOT / "examples" / "digits.py")]
    with (folder / "printed").open("w") as printed:
        process = subprocess.run(
            command, env=environment(columns=80), cwd=folder, stdout=printed, stderr=subprocess.STDOUT, timeout=900, check=False
        )
    text = (folder / "printed").read_text()
    assert process.returncode == 0, text[-3000:]
    return folder, text


def rows(printed):
    """Return the mean, the gain, its bounds, and the verdict of each candidate in the table, by name."""
    number = r"([+-]?\d+\.\d+)"
    pattern = rf"^(\w[\w ]*?) +{number} ± \d\.\d+(?: +{number} \[{number}, {number}\] +{number} +(\w+))?"
    found = re.findall(pattern, printed.partition("val/accuracy over 10 splits")[2], re.MULTILINE)
    return {name: (*(float(value or "nan") for value in values), verdict) for name, *values, _, verdict in found}


def test_regularization_gains_ten_points(job):
    results = rows(job[1])
    accuracy, gain, low, high, verdict = results["all five"]
    assert gain >= 0.1
    assert 0.05 < low < gain < high
    assert verdict == "better"
    assert gain == pytest.approx(accuracy - results["plain"][0], abs=0.011)
    assert "all five is better than plain (p = " in job[1]
    assert "Overlap 0.25;" in job[1]  # a larger validation part would cost power


def test_every_candidate_has_a_row(job):
    results = rows(job[1])
    assert list(results) == ["plain", *TECHNIQUES, "all five"]
    assert results.pop("plain")[-1] == ""
    for _, gain, low, high, verdict in results.values():
        assert low < gain < high
        assert verdict in ("better", "plain", "undecided")


def test_plain_model_memorizes_wrong_labels(job):
    """In the log of the fits with a monitor. The plain model is better before it does so."""
    logs = {path.parent.parent.name: EventAccumulator(str(path)) for path in job[0].rglob("events.out.tfevents.*")}
    assert set(logs) == {"plain", "all_five"}
    curves = {}
    for name, log in logs.items():
        log.Reload()
        for part in ("train", "val"):
            curves[name, part] = [event.value for event in log.Scalars(f"{part}/accuracy")]
    assert {len(curve) for curve in curves.values()} == {60}
    assert curves["plain", "train"][-1] > 0.99
    assert curves["all_five", "train"][-1] < 0.9
    assert max(curves["plain", "val"][:20]) > curves["plain", "val"][-1] + 0.05


def test_table_fits_80_columns(job):
    assert max(map(len, job[1].splitlines())) <= 80
    assert "…" not in job[1]


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
    assert not list(folder.rglob("*.db"))


def test_output_shows_progress_and_one_summary(job):
    assert "70/70" in job[1]
    assert job[1].count("Regularization") == 1
    assert "clip_value=0.1" in job[1]


def test_lightning_notices_are_silenced(job):
    assert [notice for notice in NOTICES if notice in job[1]] == []


@pytest.mark.slow
def test_curves_end_at_what_is_compared(monkeypatch, tmp_path):
    """A file for each run, of its split, whose last epoch has the value that counts."""
    monkeypatch.setattr(digits, "EPOCHS", 2)
    monkeypatch.setattr(digits, "SPLITS", 3)
    result = digits.compare_all(tmp_path, progress=False)
    assert list(result.runs) == ["plain", *TECHNIQUES, "all five"]
    last = {}
    for path in tmp_path.rglob("*.json"):
        epochs = json.loads(path.read_text())
        assert len(epochs) == 2
        last[path.parent.name, int(path.stem)] = epochs[-1]["val/accuracy"]
    compared = {(name, split): run.value for name, runs in result.runs.items() for split, run in enumerate(runs)}
    assert last == compared
    assert len(set(compared.values())) > 5


def test_history_writes_only_where_a_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, history = digits.Digits(train_samples=40), digits.History()
    Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[history]).fit(digits.DigitsClassifier(), data)
    assert history.epochs[0].keys() >= {"train/loss", "val/loss", "train/accuracy", "val/accuracy"}
    assert not list(tmp_path.iterdir())


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
    for samples in (40, 1430):
        data = digits.Digits(train_samples=samples)
        data.setup("fit")
        sizes = [len(data.training), len(data.validation), len(data.testing)]
        assert sizes == [samples, samples // 4, 1797 - samples - samples // 4]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("label_noise=1.5", r"Digits: label_noise must be in \[0, 1\], got 1.5"),
        ("label_noise=-0.1", r"Digits: label_noise must be in \[0, 1\], got -0.1"),
        ("label_noise=.nan", r"Digits: label_noise must be in \[0, 1\], got nan"),
        ("train_samples=39", r"Digits: train_samples must be in \[40, 1430\], got 39"),
        ("train_samples=1431", r"Digits: train_samples must be in \[40, 1430\], got 1431"),
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
