"""The figure of ``OverfittingMonitor``."""

from __future__ import annotations

import sys

import pytest
from helpers import Memory
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_overfitting import run
from test_verdict import CASES, Wide, wrong_labels

from lightning_reg import OverfittingMonitor
from lightning_reg.monitors.figure import draw_curves
from lightning_reg.monitors.verdict import judge

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]])
def test_every_case_can_be_drawn(case, tmp_path):
    points = CASES[case]
    figure = draw_curves(points, "val/loss", judge(points))
    figure.savefig(tmp_path / "curves.png")
    above, below = figure.axes
    assert [label.get_text() for label in above.get_legend().get_texts()][:2] == ["training sample", "validation sample"]
    assert list(above.lines[1].get_ydata()) == pytest.approx([point.val for point in points], nan_ok=True)
    assert list(below.lines[0].get_ydata()) == pytest.approx([point.gap for point in points], nan_ok=True)
    marks = [line for line in below.lines if line.get_linestyle() == "--"]
    since = judge(points).since
    assert [line.get_xdata()[0] for line in marks] == ([] if since is None else [since])


def test_metrics_to_maximize_are_drawn_as_they_are():
    points = CASES["fits"]
    figure = draw_curves(points, "val/accuracy", judge(points, -1.0), -1.0)
    assert list(figure.axes[0].lines[0].get_ydata()) == [-point.train for point in points]
    assert list(figure.axes[1].lines[0].get_ydata()) == [point.gap for point in points]


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger], ids=["TensorBoard", "CSV"])
def test_figure_is_saved_and_handed_to_tensorboard(kind, tmp_path):
    logger = kind(tmp_path)
    run([OverfittingMonitor(metric="val/loss", name="my monitor/1")], logger=logger)
    assert (tmp_path / "lightning_logs" / "version_0" / "my_monitor_1.png").stat().st_size > 10_000
    if kind is TensorBoardLogger:
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert events.Tags()["images"] == ["reg/my monitor/1"]


def test_no_figure_is_saved_without_a_log_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in ({"logger": False}, {"logger": Memory()}, {"fast_dev_run": True}):
        run([OverfittingMonitor(metric="val/loss")], **options)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_figure_that_cannot_be_saved_is_a_warning(tmp_path):
    (tmp_path / "lightning_logs").mkdir()
    (tmp_path / "lightning_logs" / "version_0").mkdir()
    (tmp_path / "lightning_logs" / "version_0" / "OverfittingMonitor.png").mkdir()
    with pytest.warns(UserWarning, match="OverfittingMonitor could not save its figure: "):
        run([OverfittingMonitor(metric="val/loss")], logger=CSVLogger(tmp_path, version=0, name="lightning_logs"))


def test_errors(monkeypatch):
    monitor = OverfittingMonitor(metric="val/loss")
    with pytest.raises(ValueError, match="OverfittingMonitor has no curves: no epoch has been evaluated yet"):
        monitor.figure()
    run([monitor])
    assert monitor.figure().axes[0].get_ylabel() == "val/loss"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'lightning-reg\[plots\]'"):
        monitor.figure()


def main(path: str) -> None:
    """Save the figure of a fit that over-fits, to look at."""
    monitor = OverfittingMonitor(metric="val/loss")
    run([monitor], model=Wide(lr=0.1), train=wrong_labels(300, 0.4), max_epochs=40)
    monitor.figure().savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
