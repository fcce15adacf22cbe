"""A script that compares and chooses under DDP, which Lightning starts again for the second rank.

Started by ``test_tuning_ranks.py``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from optuna.distributions import FloatDistribution
from test_compare import Linear, loaders

from lightning_reg import L2Penalty
from lightning_reg.tuning import Technique, choose, compare

TRAINER = {"max_epochs": 1, "accelerator": "cpu", "strategy": "ddp", "devices": 2}
SEARCH = {"techniques": [Technique(L2Penalty, strength=FloatDistribution(1e-3, 1e-1, log=True))], "trials": 4, "confirm": 3}


def main(folder: Path) -> None:
    """Compare and choose on both ranks, and save what each got."""
    warnings.simplefilter("ignore")
    candidates = {"plain": [], "l2": [L2Penalty(0.1)]}
    options = {"metric": "val/loss", "trainer": TRAINER, "progress": False}
    result = compare(Linear, loaders, candidates, repeats=3, **options)
    choice = choose(Linear, loaders, storage=f"sqlite:///{folder}/choose.db", **SEARCH, **options)
    found = {
        "values": {name: [run.value for run in runs] for name, runs in result.runs.items()},
        "seconds": [run.seconds for run in result.runs["l2"]],
        "overlap": result.overlap,
        "trials": [trial.value for trial in choice.trials],
        "kept": choice.kept,
    }
    (folder / f"{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
