"""Dropout that is driven beside ``nn.Dropout``, in eager code and under ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_reg.functional import Rate, find_dropout, inject_dropout, set_dropout_
from tests.benchmarks.measuring import Claim

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = [p / 12 for p in range(12)]


def claims() -> list[Claim]:
    """Return what is claimed of dropout; no slower, within a twentieth that is noise."""
    x = torch.randn(256, 1024)
    driven, injected, plain = nn.Dropout(0.3), nn.Identity(), nn.Dropout(0.3)
    (place,) = find_dropout(driven)
    place.take(Rate(0.3))
    inject_dropout({"identity": injected}, 0.3)
    behind = nn.Sequential(nn.Identity(), nn.Dropout(0.3))
    return [
        Claim("driven dropout, eager, against nn.Dropout", lambda: driven(x), lambda: plain(x), 0.95),
        Claim("injected dropout, eager, against a layer", lambda: injected(x), lambda: behind(x), 0.95),
        Claim("12 rates, compiled anew, against setting p", compiled(drive=True), compiled(drive=False), 1),
    ]


def report_graphs() -> str:
    """Say how many graphs the twelve rates need in both ways."""
    graphs = {}
    for drive in (True, False):
        torch._dynamo.utils.counters.clear()
        compiled(drive)()
        graphs[drive] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return (
        f"12 rates under torch.compile: {graphs[True]} graph where they are driven, {graphs[False]} where p is set (then eager)"
    )


def compiled(drive: bool) -> Callable[[], object]:
    """Return a function that compiles a model and runs it with twelve rates."""

    def run() -> None:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5))
        places, rate = find_dropout(model), Rate(0.5)
        if drive:
            places[0].take(rate)
        run = torch.compile(model)
        for p in RATES:
            rate.set(p)
            set_dropout_(places, p)
            run(torch.ones(64, 64)).sum().backward()

    return run
