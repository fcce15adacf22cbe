"""Is this better? Candidates on the same splits, with a test that accounts for the data that splits share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from lightning_reg._engine.arguments import check_integer, described_value
from lightning_reg.tuning.files import described_callbacks
from lightning_reg.tuning.progress import progress_bar
from lightning_reg.tuning.results import (
    Difference,
    Report,
    difference,
    known_overlap,
    p_in_words,
    paired_differences,
    smallest_difference,
)
from lightning_reg.tuning.runs import check_splits, checked_run, measure, shared_settings
from lightning_reg.tuning.statistics import corrected_t_test, holm
from lightning_reg.tuning.storage import open_storage, open_study

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning.pytorch import LightningModule

    from lightning_reg.tuning.experiment import Data, Mode, Run
    from lightning_reg.tuning.storage import Outcome, Storage


@dataclass(kw_only=True)
class Comparison(Report):
    """The result of `compare`. See `Report` for the other attributes.

    Attributes:
        best: The candidate with the largest gain among those that are better, or the first candidate.
    """

    best: str = ""

    def summary(self) -> str:
        """Return the result in one sentence."""
        plain = next(iter(self.runs))
        if self.verdict == "better":
            return f"{self.best} is better than {plain} ({p_in_words(self.differences[self.best].p_value)})"
        if self.verdict == "plain":
            return f"keep {plain}: no candidate gains {self.rope:.2g} or more"
        return f"undecided: no candidate is clearly better than {plain}"


def compare(
    model: Callable[[], LightningModule] | None,
    data: Data | None,
    candidates: Mapping[str, Sequence[Callback]],
    *,
    metric: str = "value",
    mode: Mode = "min",
    repeats: int = 10,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    overlap: float | None = None,
    rope: float | None = None,
    storage: Storage = None,
    name: str = "compare",
    run: Run | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare lists of callbacks on the same splits and seeds, and test each against the first.

    Differences are paired by split. The corrected resampled t-test is one-sided at 5%, with Holm's correction for several
    candidates. Fix the number of repeats in advance. If you look after each repeat and stop as soon as you like the result,
    the test errs in 20% of studies or more.

    Args:
        model: Function that returns a new model. ``None`` with ``run``.
        data: Function that returns the data of a split: a ``LightningDataModule``, or a training and a validation loader. Each
            number is a new random split, or a fold. ``None`` with ``run``.
        candidates: A mapping from the name of each candidate to its callbacks. The first is the one to beat, usually ``[]``.
        metric: A metric that the model logs. Its value after the last epoch counts, not the best of all epochs.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.
        repeats: Number of splits, at least 3.
        trainer: Arguments of the Trainer. By default, it has no logger, checkpoints, progress bar, or summary.
        seed: The run of split i is seeded with ``seed + i``, model and data included.
        overlap: Validation samples divided by training samples. By default, the runs count the samples. 0 if each split is
            fresh data.
        rope: The smallest difference that matters. By default, half the standard deviation of the first candidate's runs.
        storage: URL of a database that stores the runs, such as ``"sqlite:///runs/compare.db"``. An interrupted comparison
            resumes, and other processes may help. By default, nothing is stored.
        name: Name of the study in the database.
        run: Function ``(callbacks, split, seed) -> float`` to use instead of a model, data, and a Trainer. Requires
            ``overlap``.
        progress: Whether to show a progress bar.

    Returns:
        The verdict, the callbacks to use, and the difference of each candidate from the first.

    Raises:
        ValueError: If an argument is out of range, the metric is not logged, ``data`` ignores the split, or a stored study was
            made with other settings.
        TypeError: If an argument has the wrong type.
        RuntimeError: If three runs in a row fail.

    Example:
        >>> from random import Random
        >>> from lightning_reg import L2Penalty
        >>> def run(callbacks, split, seed):  # instead of training
        ...     return Random(seed).gauss(0, 1) + 2 * len(callbacks) + Random(f"{callbacks}{seed}").gauss(0, 1)
        >>> candidates = {"plain": [], "l2": [L2Penalty(1e-3)]}
        >>> result = compare(None, None, candidates, mode="max", run=run, overlap=0.25, progress=False)
        >>> result.verdict, result.callbacks
        ('better', [L2Penalty(0.001)])

    Reference:
        C. Nadeau, Y. Bengio, "Inference for the Generalization Error", 2003.
    """
    listed = checked_candidates(candidates)
    check_integer("repeats", repeats, 3)
    splits = list(range(repeats))
    run = checked_run(model, data, metric, mode, trainer, seed, overlap, rope, run)
    check_splits(run, splits)
    settings = {
        "candidates": {key: described_callbacks(callbacks) for key, callbacks in listed.items()},
        **shared_settings(metric, seed, overlap, trainer),
        "repeats": repeats,
    }
    shown = progress_bar("Comparing", len(listed) * repeats, mode, progress)
    with open_storage(storage) as opened, shown as report:
        study = open_study(opened, name, mode, settings)
        runs = measure(study, run, list(listed), listed.__getitem__, splits, seed, report)
    return judged(listed, runs, splits, metric, mode, known_overlap(overlap, runs), rope)


def judged(
    candidates: Mapping[str, list[Callback]],
    runs: dict[str, list[Outcome]],
    splits: list[int],
    metric: str,
    mode: Mode,
    overlap: float,
    rope: float | None,
) -> Comparison:
    """Evaluate the runs of candidates.

    Args:
        candidates: The callbacks of each candidate, the one to beat first.
        runs: The runs of each candidate, in the order of the splits.
        splits: The splits.
        metric: The metric.
        mode: Whether lower or higher values are better.
        overlap: Validation samples divided by training samples.
        rope: The smallest difference that matters, or ``None`` for half the standard deviation of the first candidate's runs.

    Raises:
        RuntimeError: If fewer than two runs of the first candidate succeeded.
    """
    plain, *others = runs
    values = {key: [outcome.value for outcome in of_key] for key, of_key in runs.items()}
    smallest = smallest_difference(values[plain], rope, runs[plain][-1].error)
    paired = {key: paired_differences(values[key], values[plain], mode) for key in others}
    adjusted = holm([corrected_t_test(paired[key], overlap).p_value for key in others])
    found = {key: difference(paired[key], overlap, smallest, p) for key, p in zip(others, adjusted, strict=True)}
    better = [key for key in others if found[key].verdict == "better"]
    best = max(better, key=lambda key: found[key].mean, default=plain)
    verdict = overall(found)
    return Comparison(
        verdict=verdict,
        callbacks=list(candidates[best]) if better else [],
        differences=found,
        metric=metric,
        mode=mode,
        overlap=overlap,
        rope=smallest,
        runs=runs,
        splits=splits,
        best=best,
    )


def overall(differences: Mapping[str, Difference]) -> Any:
    """Return the verdict on all candidates: better if one is, plain if none gains enough to matter, otherwise undecided."""
    verdicts = {found.verdict for found in differences.values()}
    return "better" if "better" in verdicts else "undecided" if "undecided" in verdicts else "plain"


def checked_candidates(candidates: Mapping[str, Sequence[Callback]]) -> dict[str, list[Callback]]:
    """Return the callbacks of each candidate.

    Raises:
        TypeError: If they are not a mapping from names to lists of callbacks.
        ValueError: If there are fewer than two.
    """
    if not isinstance(candidates, Mapping):
        raise TypeError(
            f'candidates must be a mapping, as in {{"plain": [], "l2": [L2Penalty(1e-3)]}}, got {described_value(candidates)}'
        )
    listed: dict[str, list[Callback]] = {}
    for key, given in candidates.items():
        listed[key] = [given] if isinstance(given, Callback) else list(given)
    for key, callbacks in listed.items():
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"candidate {key!r}: expected callbacks, got {described_value(callback)}")
    if len(listed) < 2:
        raise ValueError(f"candidates must have at least two entries, the one to beat first, got {len(listed)}")
    return listed
