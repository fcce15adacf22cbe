"""A progress bar for many runs, with the best value so far and the time left."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_reg.tuning.ranks import follows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_reg.tuning.experiment import Mode
    from lightning_reg.tuning.storage import Outcome


@contextmanager
def progress_bar(what: str, total: int, mode: Mode, shown: bool) -> Iterator[Callable[[dict[str, Outcome]], None]]:
    """Show a bar during runs, and yield the function that advances it, which takes the outcomes so far.

    Args:
        what: The purpose of the runs.
        total: The total number of runs.
        mode: Whether the lowest or the highest value is the best.
        shown: Whether to show it.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("best {task.fields[best]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False, compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown or follows(), speed_estimate_period=3600) as bar:
        task = bar.add_task(what, total=total, best="–")
        yield lambda outcomes: bar.update(task, completed=len(outcomes), best=best_of(outcomes, mode))


def best_of(outcomes: dict[str, Outcome], mode: Mode) -> str:
    """Return the best value so far as a string."""
    values = [outcome.value for outcome in outcomes.values() if math.isfinite(outcome.value)]
    return f"{(min if mode == 'min' else max)(values):.4g}" if values else "–"
