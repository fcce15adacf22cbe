"""A process that chooses with a database, for ``test_tuning_storage.py``.

It logs each run, and may hang in one until it is stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from synthetic import objective, techniques

from lightning_reg.tuning import choose, storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Callback

storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 12  # a busy machine may delay a heartbeat for seconds
TRIALS, CONFIRM, RACED = 12, 4, 60


def main(address: str, folder: Path, hang_at: int) -> None:
    """Choose, and write what was found to a file named by the process."""
    warnings.simplefilter("ignore")
    started = 0

    def run(callbacks: Sequence[Callback], split: int, seed: int) -> float:
        nonlocal started
        started += 1
        log(folder, {"callbacks": repr(callbacks), "split": split, "started": started})
        if started == hang_at:
            time.sleep(600)
        time.sleep(0.05)
        return objective(1, 1.5)(callbacks, split, seed)

    options = {"trials": TRIALS, "confirm": CONFIRM, "mode": "max", "overlap": 0.25, "progress": False}
    choice = choose(None, None, techniques=techniques(), run=run, storage=address, **options)
    result = {"kept": choice.kept, "claimed": choice.claimed, "verdict": choice.verdict, "trials": len(choice.trials)}
    (folder / f"{os.getpid()}.json").write_text(json.dumps(result))


def race(address: str, folder: Path) -> None:
    """Do tasks that take no time, so that processes often ask for the next one at the same moment."""
    warnings.simplefilter("ignore")

    def execute(values: dict[str, str]) -> float:
        log(folder, values)
        return 1.0

    with storage.open_storage(address) as opened:
        study = storage.open_study(opened, "race", "min", {})
        tasks: dict[str, dict[str, object]] = {str(number): {} for number in range(RACED)}
        storage.perform(study, tasks, lambda trial: {"task": trial.user_attrs["task"]}, execute)


def log(folder: Path, entry: dict[str, object]) -> None:
    """Append an entry to the log that all processes share."""
    with (folder / "runs.log").open("a") as file:
        file.write(json.dumps({"process": os.getpid(), **entry}) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may ignore
    if sys.argv[3] == "race":
        race(sys.argv[1], Path(sys.argv[2]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
