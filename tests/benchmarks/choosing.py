"""What ``choose`` finds on real data, and with placebos: ``python -m tests.benchmarks.choosing data`` or ``placebo``.

``data``: on each of seven small sets, three outer splits. ``choose`` sees only the development part of each. Then the callbacks
that it returns meet the plain model on the test part. A split where it returns none counts as it is: no difference.

``placebo``: studies on digits with techniques that only draw random numbers. The right answer is always "none".
"""

from __future__ import annotations

import argparse
import copy
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import rich
import torch
from digits import Digits, DigitsClassifier
from lightning.pytorch import Callback, Trainer, seed_everything
from optuna.distributions import IntDistribution
from rich.table import Table

from lightning_reg.tuning import Choice, Technique, choose
from lightning_reg.tuning.experiment import QUIET, quiet
from tests.benchmarks.datasets import DATASETS, Outer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEST_SEEDS = range(5)


class Score(NamedTuple):
    """A model on test data."""

    loss: float
    score: float


class Found(NamedTuple):
    """What ``choose`` found on an outer split, and what that is worth on its test data."""

    dataset: str
    choice: Choice
    plain: Score
    chosen: Score


# Real data ----------------------------------------------------------------------------------------------------------


def choose_on(name: str, number: int, trials: int, confirm: int, epochs: int) -> Found:
    """Choose on an outer split of a set, and test what was chosen."""
    outer = Outer(DATASETS[name], number)
    trainer = {"max_epochs": epochs, "accelerator": "cpu", "check_val_every_n_epoch": epochs}
    options = {"trials": trials, "confirm": confirm, "trainer": trainer, "seed": 1000 * number}
    choice = choose(outer.model, outer.data, metric="val/loss", storage=None, progress=False, **options)
    plain = mean_score(outer, [], trainer)
    return Found(name, choice, plain, mean_score(outer, choice.callbacks, trainer) if choice.callbacks else plain)


def mean_score(outer: Outer, callbacks: Sequence[Callback], trainer: dict[str, Any]) -> Score:
    """Train on all development samples, and return the mean over five seeds of the loss and the score on test data."""
    return Score(*map(fmean, zip(*(score(outer, callbacks, trainer, seed) for seed in TEST_SEEDS), strict=True)))


def score(outer: Outer, callbacks: Sequence[Callback], trainer: dict[str, Any], seed: int) -> Score:
    """Train on all development samples, and return the loss and the score on test data."""
    seed_everything(seed, verbose=False)
    train, held_out = outer.loaders(outer.development, outer.test)
    model = outer.model()
    with quiet():
        given = {**QUIET, **trainer, "limit_val_batches": 0, "callbacks": copy.deepcopy(list(callbacks))}
        Trainer(**given).fit(model, train, held_out)
    (batch,) = held_out
    with torch.inference_mode():
        return Score(model.eval().loss(batch).item(), model.score(batch).item())


def data_table(results: Sequence[Found]) -> Table:
    """Return a table with a row for each outer split."""
    table = Table(title="choose on real data, three outer splits of each set")
    for column in ("Data", "Chosen", "Claimed", "Confirmed", "Test loss", "Test score", "Outcome"):
        table.add_column(column, justify="left" if column in ("Data", "Chosen") else "right")
    for found in results:
        confirmed = found.choice.differences.get("chosen")
        table.add_row(
            found.dataset,
            ", ".join(type(callback).__name__ for callback in found.choice.callbacks) or f"none ({found.choice.verdict})",
            f"{found.choice.claimed:+.3f}",
            f"{confirmed.mean:+.3f} [{confirmed.low:.3f}, {confirmed.high:.3f}]" if confirmed else "",
            f"{found.plain.loss:.3f} → {found.chosen.loss:.3f}",
            f"{found.plain.score:.3f} → {found.chosen.score:.3f}",
            outcome(found),
        )
    return table


def outcome(found: Found) -> str:
    """Return whether the chosen callbacks win or lose against plain in the test loss."""
    if not found.choice.callbacks:
        return "plain kept"
    return "win" if found.chosen.loss < found.plain.loss else "loss"


# Placebos -----------------------------------------------------------------------------------------------------------


class RandomNumbers(Callback):
    """Draw some random numbers when the fit starts, so that everything after is random in another way.

    Args:
        numbers: How many.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers

    def on_fit_start(self, trainer, pl_module):
        torch.rand(self.numbers)


def placebo_studies(studies: int, trials: int, confirm: int, epochs: int) -> Iterator[Choice]:
    """Choose among placebos on digits, each study with splits of its own."""
    placebos = [Technique(RandomNumbers, name=f"placebo {n}", numbers=IntDistribution(1, 10_000)) for n in (1, 2, 3)]
    for study in range(studies):
        yield choose(
            DigitsClassifier,
            lambda split, first=1000 * study: Digits(seed=first + split),
            techniques=placebos,
            trials=trials,
            confirm=confirm,
            metric="val/accuracy",
            mode="max",
            trainer={"max_epochs": epochs, "accelerator": "cpu", "check_val_every_n_epoch": epochs},
            seed=1000 * study,
            storage=None,
            progress=False,
        )


def placebo_lines(choices: Sequence[Choice]) -> str:
    """Return what the studies with placebos found."""
    verdicts = [choice.verdict for choice in choices]
    confirmed = [choice.differences["chosen"].mean for choice in choices if choice.differences]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("better", "plain", "undecided"))
    return (
        f"{sum(not choice.callbacks for choice in choices)} of {len(choices)} studies with placebos choose nothing ({counts}). "
        f"Median gain claimed by the search: {median(choice.claimed for choice in choices):+.4f}. "
        f"{len(confirmed)} went on to the confirmation; median gain there: {median(confirmed or [0.0]):+.4f}"
    )


def main() -> None:
    """Run one of the two benchmarks, and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "placebo"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "placebo":
        rich.print(placebo_lines(list(placebo_studies(studies=20, trials=8, confirm=10, epochs=3))))
        return
    results = []
    for name in DATASETS:
        for number in range(3):
            results.append(choose_on(name, number, trials=20, confirm=10, epochs=25))
            print(f"{name}, split {number}: {results[-1].choice.summary()}", flush=True)  # noqa: T201
    rich.print(data_table(results))


if __name__ == "__main__":
    main()
