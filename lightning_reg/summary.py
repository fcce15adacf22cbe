"""The table at the start of a fit: which regularizer acts on what, how strongly, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich
from lightning.pytorch.callbacks import ModelSummary
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from lightning_reg.base import Regularizer

__all__ = ["print_line", "print_summary", "summary_table"]


def print_summary(trainer: Trainer, regularizers: Sequence[Regularizer]) -> None:
    """Print the table on rank zero, unless Lightning's own summary is off (``enable_model_summary=False``) too."""
    if _wanted(trainer):
        rich.print(summary_table(regularizers))


def print_line(trainer: Trainer, line: str) -> None:
    """Print a line about the fit where its table was printed."""
    if _wanted(trainer):
        rich.print(Text(line))


def summary_table(regularizers: Sequence[Regularizer]) -> Table:
    """Return a table with a row for each regularizer, in the order in which they act."""
    table = Table(title="Regularization", title_justify="left", header_style="bold magenta")
    for column in ("Callback", "Acts on", "Setting", "Route"):
        table.add_column(column, overflow="fold")
    for regularizer in regularizers:
        settings = [f"{key}={getattr(regularizer, key)!r}" for key in regularizer.limits]
        cells = (regularizer.name, regularizer.acts_on(), ", ".join(settings), regularizer.route())
        table.add_row(*map(Text, cells))
    return table


def _wanted(trainer: Trainer) -> bool:
    return trainer.is_global_zero and any(isinstance(cb, ModelSummary) for cb in trainer.callbacks)  # type: ignore[attr-defined]
