"""The summary at the start of a fit: what each callback acts on, with which settings, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich
from rich.table import Table
from rich.text import Text

from lightning_reg._engine import _lightning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from lightning_reg._engine.technique import Technique


def print_summary(trainer: Trainer, techniques: Sequence[Technique]) -> None:
    """Print the summary on rank zero, unless Lightning's own is turned off (``enable_model_summary=False``)."""
    if _lightning.prints_summary(trainer):
        rich.print(summary_table(techniques))


def print_line(trainer: Trainer, line: str) -> None:
    """Print a line if the summary is printed."""
    if _lightning.prints_summary(trainer):
        rich.print(Text(line))


def summary_table(techniques: Sequence[Technique]) -> Table:
    """Return a table with a row for each technique, in the order in which they act."""
    table = Table(title="Regularization", title_justify="left", header_style="bold magenta")
    for column in ("Callback", "Acts on", "Setting", "Route"):
        table.add_column(column, overflow="fold")
    for technique in techniques:
        settings = [f"{key}={getattr(technique, key)!r}" for key in technique.valid_ranges]
        cells = (technique.name, technique.acts_on(), ", ".join(settings), technique.route())
        table.add_row(*map(Text, cells))
    return table
