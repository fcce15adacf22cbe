"""Scheduled and injected dropout, compared with ``nn.Dropout``, in eager code and under ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_reg.functional import Rate, find_dropout, inject_dropout, set_dropout_
from tests.benchmarks.measuring import DEVICE, Comparison

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = [p / 12 for p in range(12)]


def comparisons() -> list[Comparison]:
    """Return the comparisons with ``nn.Dropout``, and with setting its ``p``."""
    x = torch.randn(256, 1024, device=DEVICE)
    scheduled, injected, plain = nn.Dropout(0.3), nn.Identity(), nn.Dropout(0.3)
    (site,) = find_dropout(scheduled)
    site.use(Rate(0.3, DEVICE))
    inject_dropout({"identity": injected}, 0.3)
    layers = nn.Sequential(nn.Identity(), nn.Dropout(0.3))
    return [
        Comparison("scheduled dropout, 256 × 1024 entries", lambda: scheduled(x), lambda: plain(x)),
        Comparison("injected dropout, 256 × 1024 entries", lambda: injected(x), lambda: layers(x)),
        Comparison(
            "12 dropout rates under torch.compile, with compilation", compiled(scheduled=True), compiled(scheduled=False)
        ),
    ]


def report_graphs() -> str:
    """Return how many graphs twelve rates need, scheduled and set by hand."""
    graphs = {}
    for scheduled in (True, False):
        torch._dynamo.utils.counters.clear()
        compiled(scheduled)()
        graphs[scheduled] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return (
        f"12 dropout rates under torch.compile: {graphs[True]} graph with a schedule; {graphs[False]} graphs with p set by "
        "hand, and then no compilation"
    )


def compiled(scheduled: bool) -> Callable[[], object]:
    """Return a function that compiles a model and runs it with twelve rates, on the CPU: what counts is the compilation."""

    def run() -> None:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5))
        sites, rate = find_dropout(model), Rate(0.5)
        if scheduled:
            sites[0].use(rate)
        run = torch.compile(model)
        for p in RATES:
            rate.set(p)
            set_dropout_(sites, p)
            run(torch.ones(64, 64)).sum().backward()

    return run
