"""Which ones? A search over techniques, and a confirmation on splits that the search never saw."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from lightning.pytorch.utilities.seed import isolate_rng
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import TPESampler
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_reg._engine.arguments import check_integer, described_value
from lightning_reg.tuning.progress import progress_bar
from lightning_reg.tuning.results import (
    Difference,
    Report,
    decimals,
    difference,
    known_overlap,
    p_in_words,
    paired_differences,
    smallest_difference,
)
from lightning_reg.tuning.runs import check_splits, checked_run, may_start_ranks, measure, shared_settings
from lightning_reg.tuning.statistics import LEVEL, standard_error
from lightning_reg.tuning.storage import open_storage, open_study, perform
from lightning_reg.tuning.techniques import Technique, default_techniques

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch import Callback, LightningModule
    from matplotlib.figure import Figure
    from optuna import Study, Trial

    from lightning_reg.tuning.experiment import Data, Mode, Run
    from lightning_reg.tuning.storage import Outcome, Storage

Setting: TypeAlias = "dict[str, dict[str, Any]]"
"""The techniques that are on, by their names, each with the values of its arguments."""

SEARCH_SPLIT = 0
TRIM_SPLITS = range(1, 6)
CONFIRM_FROM = TRIM_SPLITS.stop
PLAIN = "{}"


class Worth(NamedTuple):
    """What a technique contributes, measured by leaving it out.

    Attributes:
        mean: How much worse the metric is without it, as a mean over splits 1 to 5. Positive if the technique helps.
        error: Standard error of the mean.
        kept: Whether the technique is kept: the mean is above one standard error.
    """

    mean: float
    error: float
    kept: bool


@dataclass(kw_only=True)
class Choice(Report):
    """The result of `choose`. See `Report` for the other attributes.

    Attributes:
        found: The techniques and values of the best trial.
        kept: The techniques and values that were kept after leaving each one out.
        claimed: The gain over plain of the best trial, on the split of the search. As the largest of many noisy numbers, it is
            too large. The confirmed gain is in ``differences["chosen"]``.
        worth: What each technique of the best trial contributes.
        trials: The runs of the search.
        level: The level of the confirmation.
    """

    found: Setting
    kept: Setting
    claimed: float
    worth: dict[str, Worth]
    trials: list[Outcome] = field(repr=False)
    level: float = LEVEL

    def summary(self) -> str:
        """Return the result in one sentence."""
        if not self.kept:
            return "keep plain: no technique that the search found helps enough"
        confirmed = self.differences["chosen"]
        if self.verdict == "better":
            return f"{', '.join(self.kept)}: better than plain ({p_in_words(confirmed.p_value)})"
        if self.verdict == "plain":
            return f"keep plain: no gain of {self.rope:.2g} or more was confirmed"
        return "undecided: the gain could not be confirmed, so keep plain, or use more splits"

    def table(self) -> Table:
        """Return a table with the claimed gain, the confirmed gain, and the contribution of each technique."""
        table = Table(title=f"{self.metric}: gain over plain", caption=self._caption(), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("What", min_width=10, overflow="fold")
        for column in ("Gain", "Interval", "Verdict"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_row(f"claimed by the best of {len(self.trials)} trials", f"{self.claimed:+.3g}", "", "no evidence")
        for name, worth in self.worth.items():
            digits = decimals(worth.error)
            verdict = "kept" if worth.kept else "left out"
            table.add_row(f"{name}, left out", f"{worth.mean:+.{digits}f}", f"± {worth.error:.{digits}f}", verdict)
        if confirmed := self.differences.get("chosen"):
            digits = decimals(confirmed.high - confirmed.low)
            interval = f"[{confirmed.low:.{digits}f}, {confirmed.high:.{digits}f}]"
            table.add_row(
                f"confirmed on {len(self.splits)} new splits", f"{confirmed.mean:+.{digits}f}", interval, self.verdict
            )
        return table

    def _caption(self) -> str:
        better = "higher" if self.mode == "max" else "lower"
        return (
            f"{self.summary()}\nPositive is better ({better} {self.metric}). Differences below {self.rope:.2g} do not matter."
        )

    def pairs(self) -> list[float]:
        """Return the paired differences of the confirmation."""
        chosen, plain = ([run.value for run in self.runs[name]] for name in ("chosen", "plain"))
        return paired_differences(chosen, plain, self.mode)

    def figure(self) -> Figure:
        """Draw the trials of the search, the claimed gain, and the confirmed gain."""
        from lightning_reg.tuning.figures import draw_choice

        return draw_choice(self)


def choose(
    model: Callable[[], LightningModule] | None,
    data: Data | None,
    *,
    techniques: Sequence[Technique] | Literal["default"] = "default",
    trials: int = 50,
    confirm: int = 10,
    metric: str = "value",
    mode: Mode = "min",
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
    overlap: float | None = None,
    rope: float | None = None,
    storage: Storage = "sqlite:///runs/choose.db",
    name: str = "choose",
    run: Run | None = None,
    progress: bool = True,
) -> Choice:
    """Search for techniques and strengths, drop those that do not help, and confirm the rest on new splits.

    The best of many trials looks good by chance: the best of 50 identical runs gains about two standard deviations of a run.
    So there are three steps. First, Optuna searches on split 0. Second, each technique is left out in turn, on splits 1 to 5,
    and stays only if the metric gets worse by more than one standard error. Third, the remaining techniques are compared with
    the plain model on ``confirm`` new splits, in a single test. Only that test counts.

    Args:
        model: Function that returns a new model. ``None`` with ``run``.
        data: Function that returns the data of a split: a ``LightningDataModule``, or a training and a validation loader. Each
            number is a new random split. ``None`` with ``run``.
        techniques: The techniques that the search may switch on, each with its ranges. By default, weight decay, an L1
            penalty, dropout after the activations, a maximum norm, and norm clipping.
        trials: Number of runs in the search, at least 1. For a resumed study, the total.
        confirm: Number of splits of the confirmation, at least 3.
        metric: A metric that the model logs. Its value after the last epoch counts.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher ones are.
        trainer: Arguments of the Trainer. By default, it has no logger, checkpoints, progress bar, or summary.
        seed: The run of split i is seeded with ``seed + i``, model and data included.
        overlap: Validation samples divided by training samples. By default, the runs count the samples. 0 if each split is
            fresh data.
        rope: The smallest difference that matters. By default, half the standard deviation of the plain model's runs.
        storage: URL of the database that stores the runs. The same call in another process, even on another machine, joins the
            study. An interrupted search resumes. ``None`` stores nothing.
        name: Name of the study in the database.
        run: Function ``(callbacks, split, seed) -> float`` to use instead of a model, data, and a Trainer. Requires
            ``overlap``.
        progress: Whether to show a progress bar.

    Returns:
        The verdict, the callbacks to use, the gain that the search claimed, and the gain that was confirmed.

    Raises:
        ValueError: If an argument is out of range, the metric is not logged, ``data`` ignores the split, the database cannot
            be reached, or the stored study was made with other settings.
        TypeError: If an argument has the wrong type.
        RuntimeError: If three runs in a row fail.

    Example:
        >>> from random import Random
        >>> from optuna.distributions import FloatDistribution
        >>> from lightning_reg import L2Penalty
        >>> def run(callbacks, split, seed):  # instead of training: the penalty helps
        ...     return Random(f"{callbacks}{split}").gauss(0, 1) + Random(split).gauss(0, 1) + 3 * len(callbacks)
        >>> techniques = [Technique(L2Penalty, strength=FloatDistribution(1e-5, 1e-2, log=True))]
        >>> options = {"trials": 10, "mode": "max", "overlap": 0.25, "storage": None, "progress": False}
        >>> choice = choose(None, None, techniques=techniques, run=run, **options)
        >>> choice.verdict, [type(callback).__name__ for callback in choice.callbacks]
        ('better', ['L2Penalty'])

    Reference:
        A. Kadra et al., "Well-tuned Simple Nets Excel on Tabular Datasets", 2021.
    """
    check_integer("trials", trials, 1)
    check_integer("confirm", confirm, 3)
    run = checked_run(model, data, metric, mode, trainer, seed, overlap, rope, run)
    listed = checked_techniques(techniques, model)
    settings = {
        "techniques": [repr(technique) for technique in listed.values()],
        **shared_settings(metric, seed, overlap, trainer),
    }
    check_splits(run, [SEARCH_SPLIT, TRIM_SPLITS.start])
    with open_storage(storage) as opened:
        search = open_study(opened, name, mode, settings)
        engine = _Engine(listed, run, mode, seed, open_study(opened, f"{name}/runs", mode, settings), progress)
        tried = engine.search(search, trials)
        found = best_setting(tried, mode)
        kept, worth = engine.trim(found)
        splits, level = confirmation(engine.study, kept, confirm)
        runs = engine.measure([PLAIN, key_of(kept)], splits, "Confirming") if kept else {}
    known = known_overlap(overlap, {"search": tried, **runs})
    return _choice(engine, tried, found, kept, worth, runs, splits, known, rope, level, metric)


class _Engine:
    """Performs the runs of a choice."""

    def __init__(self, techniques: dict[str, Technique], run: Run, mode: Mode, seed: int, study: Study, progress: bool) -> None:
        self.techniques, self.run, self.mode = techniques, run, mode
        self.seed, self.study, self.progress = seed, study, progress

    def build(self, key: str) -> list[Callback]:
        """Return the callbacks of a setting."""
        return [self.techniques[name].build(values) for name, values in json.loads(key).items()]

    def search(self, study: Study, trials: int) -> list[Outcome]:
        """Run the trials of the search, the plain model first."""
        off = dict.fromkeys(self.techniques, False)
        tasks: dict[str, dict[str, Any]] = {f"trial {number}": off if number == 0 else {} for number in range(trials)}

        def suggest(trial: Trial) -> dict[str, Any]:
            suggested = {name: technique.suggest(trial) for name, technique in self.techniques.items()}
            setting = {name: values for name, values in suggested.items() if values is not None}
            return {"setting": key_of(setting)}

        def execute(values: dict[str, Any]) -> float:
            return self.run(self.build(values["setting"]), SEARCH_SPLIT, self.seed + SEARCH_SPLIT)

        with progress_bar("Searching", trials, self.mode, self.progress) as report:
            suggests = lambda number: sampler(self.seed, number)  # noqa: E731
            outcomes = perform(study, tasks, suggest, execute, report, suggests, may_start_ranks(self.run))
        return list(outcomes.values())

    def measure(self, keys: Sequence[str], splits: Sequence[int], what: str) -> dict[str, list[Outcome]]:
        """Run settings on splits."""
        names = list(dict.fromkeys(keys))
        with progress_bar(what, len(names) * len(splits), self.mode, self.progress) as report:
            return measure(self.study, self.run, names, self.build, splits, self.seed, report)

    def trim(self, found: Setting) -> tuple[Setting, dict[str, Worth]]:
        """Drop the technique that contributes least, as long as one contributes no more than its standard error."""
        kept, worth = dict(found), dict[str, Worth]()
        while kept:
            without = {name: key_of({other: kept[other] for other in kept if other != name}) for name in kept}
            runs = self.measure([key_of(kept), *without.values()], TRIM_SPLITS, "Leaving out")
            worth |= {name: worth_of(runs[key_of(kept)], runs[key], self.mode) for name, key in without.items()}
            least = min(kept, key=lambda name: worth[name].mean - worth[name].error)
            if worth[least].kept:
                break
            del kept[least]
        return kept, worth


def worth_of(complete: Sequence[Outcome], without: Sequence[Outcome], mode: Mode) -> Worth:
    """Return what a technique contributes: how much worse the runs without it are."""
    lost = paired_differences([run.value for run in complete], [run.value for run in without], mode)
    mean, error = fmean(lost), standard_error(lost, overlap=0)
    return Worth(mean, error, mean > error)


def best_setting(outcomes: Sequence[Outcome], mode: Mode) -> Setting:
    """Return the setting of the best run. Among equals, return the one with the fewest techniques.

    Raises:
        RuntimeError: If all runs failed.
    """
    succeeded = [outcome for outcome in outcomes if not outcome.error]
    if not succeeded:
        raise RuntimeError(f"all {len(outcomes)} runs of the search failed; the last one:\n{outcomes[-1].error}")
    sign = 1 if mode == "max" else -1
    settings = [setting_of(outcome) for outcome in succeeded]
    best = max(range(len(succeeded)), key=lambda index: (sign * succeeded[index].value, -len(settings[index])))
    return settings[best]


def claimed_gain(outcomes: Sequence[Outcome], mode: Mode) -> float:
    """Return by how much the best run of the search beats its run of the plain model, or NaN if that failed."""
    plain = next((outcome.value for outcome in outcomes if not setting_of(outcome)), math.nan)
    sign = 1 if mode == "max" else -1
    return max(sign * (outcome.value - plain) for outcome in outcomes if not outcome.error)


def setting_of(outcome: Outcome) -> Setting:
    """Return the setting of a run of the search."""
    setting: Setting = json.loads(outcome.values["setting"])
    return setting


def key_of(setting: Setting) -> str:
    """Return a setting as a string."""
    return json.dumps(setting, sort_keys=True)


def confirmation(study: Study, kept: Setting, confirm: int) -> tuple[list[int], float]:
    """Return the splits and the level of a confirmation.

    A resumed study may find another setting, and confirm it. It then takes new splits, and half the level of the previous
    confirmation, so that the total error is at most twice the level.

    Args:
        study: Stores what has been confirmed.
        kept: The setting to confirm.
        confirm: The number of splits.
    """
    earlier: list[str] = study.user_attrs.get("confirmed", [])
    if kept and key_of(kept) not in earlier:
        earlier = [*earlier, key_of(kept)]
        study.set_user_attr("confirmed", earlier)
    number = earlier.index(key_of(kept)) if kept else 0
    start = CONFIRM_FROM + number * confirm
    return list(range(start, start + confirm)) if kept else [], LEVEL / 2**number


def sampler(seed: int, number: int) -> TPESampler:
    """Return Optuna's sampler for a trial.

    With ``group=True``, it models the arguments of each technique from the trials that use it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, multivariate=True, group=True)


def checked_techniques(techniques: Any, model: Callable[[], LightningModule] | None) -> dict[str, Technique]:
    """Return the techniques by their names.

    Raises:
        TypeError: If one is not a `Technique`.
        ValueError: If there is none, or two have the same name.
    """
    if isinstance(techniques, str):
        if techniques != "default":
            raise ValueError(f'techniques must be a list of Technique, or "default", got {techniques!r}')
        with isolate_rng():
            techniques = default_techniques(model() if callable(model) else None)
    if isinstance(techniques, Technique):
        techniques = [techniques]
    listed: dict[str, Technique] = {}
    for technique in techniques:
        if not isinstance(technique, Technique):
            raise TypeError(f"techniques must be a list of Technique, but it contains {described_value(technique)}")
        if technique.name in listed:
            raise ValueError(f"two techniques have the name {technique.name!r}: pass name= to one of them")
        listed[technique.name] = technique
    if not listed:
        raise ValueError("techniques must have at least one entry, got none")
    return listed


def _choice(
    engine: _Engine,
    tried: list[Outcome],
    found: Setting,
    kept: Setting,
    worth: dict[str, Worth],
    runs: dict[str, list[Outcome]],
    splits: list[int],
    overlap: float,
    rope: float | None,
    level: float,
    metric: str,
) -> Choice:
    named = {"plain": runs[PLAIN], "chosen": runs[key_of(kept)]} if kept else {}
    smallest, confirmed = confirmed_difference(named, overlap, rope, level, engine.mode)
    verdict = confirmed.verdict if confirmed else "plain"
    return Choice(
        verdict=verdict,
        callbacks=engine.build(key_of(kept)) if verdict == "better" else [],
        differences={"chosen": confirmed} if confirmed else {},
        metric=metric,
        mode=engine.mode,
        overlap=overlap,
        rope=smallest,
        runs=named,
        splits=splits,
        found=found,
        kept=kept,
        claimed=claimed_gain(tried, engine.mode),
        worth=worth,
        trials=tried,
        level=level,
    )


def confirmed_difference(
    runs: Mapping[str, Sequence[Outcome]], overlap: float, rope: float | None, level: float, mode: Mode
) -> tuple[float, Difference | None]:
    """Return the smallest difference that matters, and the test of the confirmation, if there was one.

    Raises:
        RuntimeError: If fewer than two runs of the plain model succeeded.
    """
    if not runs:
        return rope or 0.0, None
    plain, chosen = ([run.value for run in runs[name]] for name in ("plain", "chosen"))
    smallest = smallest_difference(plain, rope, runs["plain"][-1].error)
    return smallest, difference(paired_differences(chosen, plain, mode), overlap, smallest, level=level)
