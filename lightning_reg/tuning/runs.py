"""Runs of candidates on splits, and the arguments that all questions share."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lightning_reg._engine.arguments import check_choice, check_seed
from lightning_reg.tuning.experiment import TrainerRun
from lightning_reg.tuning.storage import perform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch import Callback
    from optuna import Study

    from lightning_reg.tuning.experiment import Run
    from lightning_reg.tuning.storage import Outcome


def measure(
    study: Study,
    run: Run,
    candidates: Sequence[str],
    build: Callable[[str], Sequence[Callback]],
    splits: Sequence[int],
    seed: int,
    report: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, list[Outcome]]:
    """Run each candidate on each split, unless the study already has the run.

    Args:
        study: Stores the runs.
        run: Performs a run.
        candidates: The names of the candidates.
        build: Function that returns the callbacks of a name. Other processes may have written names that are not in
            ``candidates``.
        splits: The numbers of the splits.
        seed: The run of split i is seeded with ``seed + i``.
        report: Function that is called with the outcomes so far.

    Returns:
        The outcomes of each candidate, in the order of the splits.
    """
    keys = {(name, split): json.dumps({"candidate": name, "split": split}) for split in splits for name in candidates}

    def execute(values: dict[str, Any]) -> float:
        return run(build(values["candidate"]), values["split"], seed + values["split"])

    tasks: dict[str, dict[str, Any]] = {key: {} for key in keys.values()}
    outcomes = perform(
        study, tasks, lambda trial: json.loads(trial.user_attrs["task"]), execute, report, joint=may_start_ranks(run)
    )
    return {name: [outcomes[keys[name, split]] for split in splits] for name in candidates}


def checked_run(
    model: Any,
    data: Any,
    metric: str,
    mode: str,
    trainer: Any,
    seed: int,
    overlap: float | None,
    rope: float | None,
    run: Run | None,
    training: bool = False,
) -> Run:
    """Check the arguments that all questions share, and return the function that makes a run.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one has the wrong type.
    """
    check_choice("mode", mode, ("min", "max"))
    check_seed("seed", seed)
    for what, value in (("overlap", overlap), ("rope", rope)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be finite and at least 0, got {value}")
    if run is None:
        return TrainerRun(model, data, metric, trainer, training, overlap)
    if (model, data, trainer) != (None, None, None):
        raise TypeError("run= replaces model, data, and trainer: pass None for these")
    if overlap is None:
        raise ValueError("run= needs overlap=, the number of test samples divided by the number of training samples")
    return run


def may_start_ranks(run: Run) -> bool:
    """Return whether a run may be trained by several ranks."""
    if not isinstance(run, TrainerRun):
        return False
    devices = str(run.trainer.get("devices", "auto"))  # all that there are; of CPUs, one
    is_one = devices in ("1", "[0]") or (devices == "auto" and run.trainer.get("accelerator") == "cpu")
    return not is_one or run.trainer.get("num_nodes", 1) != 1


def check_splits(run: Run, splits: Sequence[int]) -> None:
    """Raise an error if the data ignore the split."""
    if isinstance(run, TrainerRun):
        run.check_data(splits)


def shared_settings(metric: str, seed: int, overlap: float | None, trainer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that all questions share, as a database stores them."""
    return {
        "metric": metric,
        "seed": seed,
        "overlap": overlap,
        "trainer": {key: repr(value) for key, value in (trainer or {}).items()},
    }
