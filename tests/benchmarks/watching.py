"""How often the interval of ``OverfittingMonitor`` contains the true gap, and by how much logged losses miss it."""

from __future__ import annotations

from statistics import fmean

from gap_truth import SHARES, covered, missed_by_logs, outcomes
from rich.table import Table

FITS = 100
"""The number of fits for each share of wrong labels."""


def coverage_table() -> Table:
    """Train 300 small models on digits with wrong labels, and return a table of the results."""
    found = outcomes(range(FITS))
    table = Table(title=f"Gap between validation and training data: {covered(found)} of {len(found)} intervals contain it")
    for column in ("Wrong labels", "contained", "true gap", "measured", "logged", "logged − true"):
        table.add_column(column, justify="right")
    for share in SHARES:
        fits = [one for one in found if one.share == share]
        gaps = [fmean(values) for values in zip(*((one.true_gap, one.gap, one.logged_gap) for one in fits), strict=True)]
        cells = [
            f"{share:.0%}",
            f"{covered(fits)} of {len(fits)}",
            *(f"{gap:.2f}" for gap in gaps),
            f"{missed_by_logs(fits):.2f}",
        ]
        table.add_row(*cells)
    return table
