"""The results of a comparison: differences with their intervals, and the tables, figures, and files that show them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_reg.tuning.files import config_of
from lightning_reg.tuning.statistics import LEVEL, Verdict, corrected_t_test, judge, repeats_needed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import Callback
    from matplotlib.figure import Figure

    from lightning_reg.tuning.experiment import Mode
    from lightning_reg.tuning.storage import Outcome


class Difference(NamedTuple):
    """The difference of a candidate from plain. Positive is better, regardless of the mode.

    Attributes:
        mean: Mean of the paired differences.
        low: Lower 5% bound of the mean.
        high: Upper 5% bound of the mean.
        p_value: One-sided p-value, adjusted if several candidates were tested.
        verdict: ``"better"``, ``"plain"`` (no gain that matters), or ``"undecided"``.
        repeats: The number of repeats that would find a difference of ``rope`` in 80% of studies. It is infinite where the
            splits share too much data, and NaN unless the verdict is ``"undecided"``.
    """

    mean: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    repeats: float


def paired_differences(runs: Sequence[float], plain: Sequence[float], mode: Mode) -> list[float]:
    """Return the differences of paired runs, positive where the first is better.

    A pair with a failed run is no evidence for "better": it counts as the worst observed difference, but never as more than 0.

    Args:
        runs: The values of a candidate, one for each split. NaN for a failed run.
        plain: The values of the plain model on the same splits.
        mode: ``"max"`` if higher values are better, ``"min"`` if lower ones are.

    Example:
        >>> paired_differences([3.0, float("nan"), 5.0], [1.0, 1.0, 1.0], "max")
        [2.0, 0.0, 4.0]
    """
    sign = 1 if mode == "max" else -1
    found = [sign * (run - base) for run, base in zip(runs, plain, strict=True)]
    worst = min([0.0, *(difference for difference in found if math.isfinite(difference))])
    return [difference if math.isfinite(difference) else worst for difference in found]


def smallest_difference(plain: Sequence[float], rope: float | None, error: str) -> float:
    """Return the smallest difference that matters: by default half the standard deviation of plain's runs.

    Args:
        plain: The values of the plain model's runs. NaN for a failed run.
        rope: The smallest difference, if the user passed one.
        error: Why a run failed.

    Raises:
        RuntimeError: If fewer than two runs succeeded.
    """
    succeeded = [value for value in plain if math.isfinite(value)]
    if len(succeeded) < 2:
        raise RuntimeError(f"{len(plain) - len(succeeded)} of {len(plain)} runs of the plain model failed:\n{error}")
    return stdev(succeeded) / 2 if rope is None else rope


def difference(
    differences: Sequence[float], overlap: float, rope: float, p_value: float | None = None, level: float = LEVEL
) -> Difference:
    """Test paired differences, and judge the result.

    Args:
        differences: The paired differences.
        overlap: Test samples divided by training samples.
        rope: The smallest difference that matters.
        p_value: The adjusted p-value, if it is not that of the test itself.
        level: The one-sided level.
    """
    test = corrected_t_test(differences, overlap, level)
    adjusted = test.p_value if p_value is None else p_value
    verdict = judge(test, adjusted, rope, level)
    needed = repeats_needed(rope, stdev(differences), overlap, level) if verdict == "undecided" and rope > 0 else math.nan
    return Difference(test.mean, test.low, test.high, adjusted, verdict, needed)


@dataclass(kw_only=True)
class Runs:
    """Measurements of runs, and the conclusion.

    Attributes:
        callbacks: What to pass to a Trainer.
        metric: The metric.
        mode: Whether lower (``"min"``) or higher values (``"max"``) are better.
        overlap: Test samples divided by training samples.
        runs: The runs of each candidate, in the order of the splits.
        splits: The splits of the runs.
    """

    callbacks: list[Callback]
    metric: str
    mode: Mode
    overlap: float
    runs: dict[str, list[Outcome]] = field(repr=False)
    splits: list[int] = field(repr=False)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with a row for each run."""
        return pd.DataFrame(
            {
                "candidate": name,
                "split": split,
                self.metric: run.value,
                "training": run.training,
                "seconds": run.seconds,
                "error": run.error,
            }
            for name, runs in self.runs.items()
            for split, run in zip(self.splits, runs, strict=True)
        )

    def to_csv(self, path: str | Path) -> None:
        """Write a row for each run to a CSV file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.to_dataframe().to_csv(path, index=False)

    def to_yaml(self, path: str | Path) -> None:
        """Write the callbacks to a file that ``fit --config`` of a LightningCLI takes.

        Raises:
            TypeError: If a callback has arguments that YAML cannot express.
        """
        config = {"trainer": {"callbacks": [config_of(callback) for callback in self.callbacks]}}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f"# {self.summary()}\n{yaml.safe_dump(config, sort_keys=False)}")

    def summary(self) -> str:
        """Return the result in one sentence."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Report(Runs):
    """The result of a comparison.

    Attributes:
        verdict: ``"better"``, ``"plain"`` (no gain that matters), or ``"undecided"``.
        callbacks: What to pass to a Trainer. Empty unless the verdict is ``"better"``.
        differences: For each candidate but the first, how it differs from the first.
        rope: The smallest difference that matters.
    """

    verdict: Verdict
    differences: dict[str, Difference]
    rope: float

    def table(self) -> Table:
        """Return a table with a row for each candidate."""
        title = f"{self.metric} over {len(self.splits)} splits"
        caption = f"\n{self.caption()}"
        table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("Candidate", min_width=10, overflow="fold")
        for column in ("Mean ± sd", "Gain and 90% interval", "p", "Verdict", "Needed", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, runs in self.runs.items():
            table.add_row(name, mean_and_deviation(runs), *self._cells(name), mean_seconds(runs))
        return table

    def caption(self) -> str:
        """Return an explanation of the numbers in the table."""
        better = "higher" if self.mode == "max" else "lower"
        footnote = ""
        if any(found.verdict == "undecided" for found in self.differences.values()):
            footnote = f" Needed: repeats that would find a difference of {self.rope:.2g}"
            footnote += "; ∞ if splits share too much data for any number." if self._needs_infinity() else "."
        return (
            f"{self.summary()}\nGain: paired difference from {next(iter(self.runs))}, positive if better "
            f"({better} {self.metric}). Overlap {self.overlap:.2g}; differences below {self.rope:.2g} do not matter.{footnote}"
        )

    def _needs_infinity(self) -> bool:
        return any(math.isinf(found.repeats) for found in self.differences.values())

    def _cells(self, name: str) -> list[str]:
        found = self.differences.get(name)
        if found is None:
            return [""] * 4
        digits = decimals(found.high - found.low)
        interval = f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"
        return [f"{found.mean:+.{digits}f} {interval}", f"{found.p_value:.3f}", found.verdict, repeats_in_words(found)]

    def figure(self) -> Figure:
        """Draw the gain of each candidate with its interval."""
        from lightning_reg.tuning.figures import draw_differences

        return draw_differences(self)


def repeats_in_words(found: Difference) -> str:
    """Return the number of repeats that would decide an undecided comparison.

    Example:
        >>> repeats_in_words(Difference(0.01, -0.02, 0.04, 0.3, "undecided", 24))
        '24'
    """
    return "" if math.isnan(found.repeats) else "∞" if math.isinf(found.repeats) else f"{found.repeats:.0f}"


def p_in_words(p_value: float) -> str:
    """Return a p-value as a string.

    Example:
        >>> p_in_words(0.0123), p_in_words(1e-7)
        ('p = 0.012', 'p < 0.001')
    """
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def decimals(spread: float) -> int:
    """Return how many decimals show two significant digits of a spread.

    Example:
        >>> decimals(0.025), decimals(3.1), decimals(0.0)
        (3, 1, 3)
    """
    return min(8, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 and math.isfinite(spread) else 3


def mean_and_deviation(runs: Sequence[Outcome]) -> str:
    """Return the mean and the standard deviation of runs, and how many failed."""
    values = [run.value for run in runs if not run.error]
    failed = f" ({len(runs) - len(values)} failed)" if len(values) < len(runs) else ""
    if len(values) < 2:
        return (f"{values[0]:.4g}" if values else "–") + failed
    digits = decimals(stdev(values))
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}{failed}"


def mean_seconds(runs: Sequence[Outcome]) -> str:
    """Return the mean time of runs, in seconds."""
    seconds = [run.seconds for run in runs if math.isfinite(run.seconds)]
    return f"{fmean(seconds):.1f}" if seconds else ""


def known_overlap(given: float | None, runs: Mapping[str, Sequence[Outcome]]) -> float:
    """Return the overlap that the user passed, or the mean of those that the runs counted."""
    counted = [run.overlap for each in runs.values() for run in each if math.isfinite(run.overlap)]
    return given if given is not None else fmean(counted)
