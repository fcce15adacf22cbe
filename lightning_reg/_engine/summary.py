"""The summary at the start of a fit: what each callback acts on, with which settings, and when."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

import rich
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import Trainer

    from lightning_reg._engine.technique import Technique


class Row(NamedTuple):
    """The entry of a technique."""

    callback: str
    acts_on: str
    setting: str
    route: str


class Summary(NamedTuple):
    """The techniques of a fit in the order in which they act, and notes about them.

    Args:
        rows: A row for each technique.
        notes: Lines to print below.
    """

    rows: list[Row]
    notes: list[str]

    def print(self) -> None:
        """Print a table, or a list if a table would break words on this console."""
        console = rich.get_console()
        console.print("Regularization", style="bold")
        table = _table(self.rows, console.width)
        if table is not None:
            console.print(table)
        else:
            console.print(Text(_list(self.rows, console.width)), soft_wrap=True)
        for line in self.notes:
            console.print(Text(_wrapped("", line, console.width)), soft_wrap=True)


def summarize(techniques: Iterable[Technique], attached: bool = True) -> Summary:
    """Return the summary of techniques, which have no targets before a fit."""
    rows = [Row(t.name, t.acts_on() if attached else "not known yet", ", ".join(t.settings()), t.route()) for t in techniques]
    return Summary(rows, list(dict.fromkeys(line for t in techniques for line in t.notes())) if attached else [])


def print_line(trainer: Trainer, line: str) -> None:
    """Print a line on rank zero."""
    if trainer.is_global_zero:
        rich.print(Text(line))


def _table(rows: Sequence[Row], width: int) -> Table | None:
    """Return the rows as a table, or ``None`` if a word would be broken."""
    headers = ("Callback", "Acts on", "Setting", "Where")
    columns = list(zip(headers, *rows, strict=True))
    widths = _column_widths(columns, width - 3 * len(columns) - 1)
    if widths is None:
        return None
    table = Table(header_style="bold magenta")
    for header, column_width in zip(headers, widths, strict=True):
        table.add_column(header, width=column_width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _column_widths(columns: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return the widths of columns that wrap between words, or ``None`` if there is not enough room.

    Example:
        >>> _column_widths([["one", "two"], ["three four", "five"]], 10)
        [3, 7]
        >>> _column_widths([["one", "two"], ["three four", "five"]], 7)
    """
    least = [max(len(word) for cell in column for word in (*cell.split(), "")) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    if sum(least) > available:
        return None
    while sum(widths) > available:
        slack = [width - smallest for width, smallest in zip(widths, least, strict=True)]
        widths[slack.index(max(slack))] -= 1
    return widths


def _list(rows: Sequence[Row], width: int) -> str:
    """Return the rows as a list with a line for each cell, wrapped between words."""
    lines = []
    for row in rows:
        lines.append(row.callback)
        cells = {"  acts on  ": row.acts_on, "  setting  ": row.setting, "  where    ": row.route}
        lines += [_wrapped(start, text, width) for start, text in cells.items() if text]
    return "\n".join(lines)


def _wrapped(start: str, text: str, width: int) -> str:
    """Wrap text between words, to the right of its start, or farther left where a word would not fit.

    Example:
        >>> print(_wrapped("setting ", "p=0.1, after='encoder.*'", 20))
        setting p=0.1,
           after='encoder.*'
    """
    words = text.split()
    indent = " " * min(len(start), max(width - max(map(len, words), default=0), 0))
    fits = not words or len(start) + len(words[0]) <= width
    lines = textwrap.fill(
        text,
        width,
        initial_indent=start if fits else indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines if fits else f"{start.rstrip()}\n{lines}"
