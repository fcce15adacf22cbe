"""Runs that are stored in a database. Each is performed once, by whichever process takes it first.

Every run is an Optuna trial. A process adds missing tasks, takes one that is waiting, runs it, and stores its value. Several
processes may do so at the same time, on the same study. If a process is killed, it stops sending heartbeats. Another process
then marks its trial as failed and runs the task again.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from lightning_reg.tuning.experiment import Measured, SetupError
from lightning_reg.tuning.ranks import Leader, follow, follows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial
    from sqlalchemy import Connection

    from lightning_reg.tuning.experiment import Mode

Storage: TypeAlias = "str | BaseStorage | None"

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 90
"""A process that sends no heartbeat for this long counts as dead. Less might mistake a busy process for a dead one."""
POLL_SECONDS = 0.5
FAILURES_IN_A_ROW = 3


class RunsFailedError(RuntimeError):
    """Several runs failed in a row. The message has the reason, and the traceback of the last one."""


class Outcome(NamedTuple):
    """A finished run.

    Attributes:
        value: Its metric, or NaN if the run failed.
        training: The metric on the training data, or NaN.
        overlap: Validation samples divided by training samples, or NaN.
        seconds: How long it took.
        error: The traceback or the reason of a failed run, or an empty string.
        values: The values of the run.
    """

    value: float
    training: float
    overlap: float
    seconds: float
    error: str
    values: dict[str, Any]


class _Skip(Exception):  # noqa: N818
    """The trial is not needed: another one has the same task."""


class _Failed(Exception):  # noqa: N818
    """The run failed. Its traceback has been stored."""


@contextmanager
def open_storage(storage: Storage) -> Iterator[BaseStorage]:
    """Open a database by its URL, such as ``"sqlite:///runs/choose.db"``, or memory for ``None``, and close it at the end.

    Raises:
        SetupError: If the database cannot be reached, or the URL is invalid.
        TypeError: If ``storage`` has the wrong type.
    """
    if storage is None or isinstance(storage, BaseStorage):
        yield storage or optuna.storages.InMemoryStorage()
        return
    database = _database(storage)
    try:
        yield database
    finally:
        database.remove_session()
        database.engine.dispose()


def _database(storage: str) -> RDBStorage:
    if not isinstance(storage, str):
        raise TypeError(f'storage must be a database URL, such as "sqlite:///runs/choose.db", or None, got {storage!r:.80}')
    try:
        url = make_url(storage)
        if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        if url.get_backend_name() != "sqlite":
            return _connected(storage, {"pool_pre_ping": True})
        database = _connected(storage, {"connect_args": {"timeout": 60, "isolation_level": None}})
        event.listen(database.engine, "begin", _begin_with_lock)
        return database
    except ArgumentError as error:
        raise SetupError(f'storage must be a database URL, such as "sqlite:///runs/choose.db", got {storage!r}') from error
    except (ImportError, SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise SetupError(f"the database {_without_password(storage)} cannot be reached: {reason}") from error


def _begin_with_lock(connection: Connection) -> None:
    """Lock the file before anything is read, so that two processes never take the same task.

    By default, Python's sqlite3 begins a transaction at the first write, when earlier reads may be out of date.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _connected(storage: str, options: dict[str, Any], tries: int = 5) -> RDBStorage:
    """Connect, and create the tables. If two processes do so at the same moment, one of them fails and tries again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return RDBStorage(storage, engine_kwargs=options, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)
        except (IntegrityError, OperationalError, ProgrammingError):
            if tries == 1:
                raise
    time.sleep(POLL_SECONDS * Random().random())
    return _connected(storage, options, tries - 1)


def _without_password(storage: str) -> str:
    return make_url(storage).render_as_string(hide_password=True)


def open_study(storage: BaseStorage, name: str, mode: Mode, settings: Mapping[str, Any]) -> Study:
    """Create a study, or join the one of this name if it was made with the same settings.

    Raises:
        SetupError: If the study was created with other settings, which the message names.
    """
    direction: Literal["minimize", "maximize"] = "minimize" if mode == "min" else "maximize"
    with _quiet():
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        now = {"mode": mode, **settings}
        stored = study.user_attrs.get("settings")
        if stored is None:
            study.set_user_attr("settings", now)
            return study
    differing = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
    if differing:
        listed = ", ".join(f"{key} (stored: {stored.get(key)!r}, now: {now.get(key)!r})" for key in differing)
        raise SetupError(f"the study {name!r} was created with other settings: {listed}; pass another name=, or delete it")
    return study


def perform(
    study: Study,
    tasks: Mapping[str, Mapping[str, Any]],
    suggest: Callable[[Trial], dict[str, Any]],
    execute: Callable[[dict[str, Any]], float],
    report: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
    sampler: Callable[[int], BaseSampler] | None = None,
    joint: bool = False,
) -> dict[str, Outcome]:
    """Perform the tasks that no process has done yet, wait for those of other processes, and return the outcome of each.

    Args:
        study: The study that stores the tasks and their values.
        tasks: For each task, by its key, the values that are fixed rather than suggested.
        suggest: Function that completes the values of a trial. What it returns can be written as JSON.
        execute: Function that runs a task with these values and returns its metric.
        report: Function that is called with the outcomes so far, at the start and after each run.
        sampler: Function from the number of a trial to the sampler of its values. The same number gives the same values, even
            in a resumed study.
        joint: Whether a run may start further ranks, which then do what this one does.

    Raises:
        RunsFailedError: If three runs in a row failed.
        SetupError: If the call is wrong, so that no run can succeed.
    """
    if not joint:
        return _perform(study, tasks, _Worker(study, suggest, execute), report, sampler)
    if follows():
        return follow(execute)
    with Leader() as leader:

        def told(values: dict[str, Any]) -> float:
            leader.tell(values)
            return execute(values)

        outcomes = _perform(study, tasks, _Worker(study, suggest, told), report, sampler)
        leader.finish(outcomes)
    return outcomes


def _perform(
    study: Study,
    tasks: Mapping[str, Mapping[str, Any]],
    worker: _Worker,
    report: Callable[[dict[str, Outcome]], None],
    sampler: Callable[[int], BaseSampler] | None,
) -> dict[str, Outcome]:
    while True:
        trials = study.get_trials(deepcopy=False)
        outcomes = {key: found for key, found in done(trials, study).items() if key in tasks}
        report(outcomes)
        missing = tasks.keys() - outcomes.keys()
        if not missing:
            return {key: outcomes[key] for key in tasks}
        waiting, running = _keys(trials, TrialState.WAITING), _keys(trials, TrialState.RUNNING)
        for key in (key for key in tasks if key in missing - waiting - running):
            study.enqueue_trial(dict(tasks[key]) or _last_params(trials, key), user_attrs={"task": key})
        if missing - running:
            if sampler is not None:
                study.sampler = sampler(_next_number(study))
            worker.take_one()
        else:
            time.sleep(POLL_SECONDS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)


def done(trials: Sequence[FrozenTrial], study: Study) -> dict[str, Outcome]:
    """Return the outcome of each finished task, by its key. A task that several trials performed counts once."""
    again = set(study.user_attrs.get("again", []))
    finished: dict[str, Outcome] = {}
    for trial in trials:
        key, error = trial.user_attrs.get("task"), trial.user_attrs.get("error", "")
        failed = trial.state == TrialState.FAIL and error and trial.number not in again
        if key is not None and key not in finished and (failed or trial.state == TrialState.COMPLETE):
            measured = trial.user_attrs.get("measured", {})
            finished[key] = Outcome(
                value=math.nan if failed or trial.value is None else trial.value,
                training=measured.get("training", math.nan),
                overlap=measured.get("overlap", math.nan),
                seconds=measured.get("seconds", math.nan),
                error=error if failed else "",
                values=trial.user_attrs.get("values", {}),
            )
    return finished


class _Worker:
    """Takes tasks, one after another, and counts consecutive failures."""

    def __init__(
        self, study: Study, suggest: Callable[[Trial], dict[str, Any]], execute: Callable[[dict[str, Any]], float]
    ) -> None:
        self.study, self.suggest, self.execute = study, suggest, execute
        self.failed: list[int] = []

    def take_one(self) -> None:
        """Take a waiting task, run it, and store its outcome."""
        with _quiet(), suppress(UpdateFinishedTrialError):  # another process mistook this one for dead, and did its task
            self.study.optimize(self._objective, n_trials=1, catch=(_Skip, _Failed))

    def _objective(self, trial: Trial) -> float:
        if self._is_superfluous(trial):
            raise _Skip
        values, start = self.suggest(trial), time.perf_counter()
        trial.set_user_attr("values", values)
        try:
            value = self.execute(values)
        except (SetupError, KeyboardInterrupt):
            raise
        except Exception as error:
            self._fail(trial, traceback.format_exc(), error)
        except BaseException:  # the process ends: let another one do the task at once
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self._keep(trial, value, time.perf_counter() - start)
        if not math.isfinite(value):
            self._fail(trial, f"the metric is {float(value)}", None)
        self.failed.clear()
        return value

    def _is_superfluous(self, trial: Trial) -> bool:
        key, trials = trial.user_attrs.get("task"), self.study.get_trials(deepcopy=False)
        earlier = (other for other in trials if other.number < trial.number and other.state == TrialState.RUNNING)
        return key is None or key in done(trials, self.study) or any(other.user_attrs.get("task") == key for other in earlier)

    def _keep(self, trial: Trial, value: float, seconds: float) -> None:
        measured = {"seconds": seconds}
        if isinstance(value, Measured):
            found = {"training": value.training, "overlap": value.overlap}
            measured |= {name: number for name, number in found.items() if math.isfinite(number)}
        trial.set_user_attr("measured", measured)

    def _fail(self, trial: Trial, error: str, cause: Exception | None) -> None:
        trial.set_user_attr("error", error)
        self.failed.append(trial.number)
        if len(self.failed) < FAILURES_IN_A_ROW:
            raise _Failed from cause
        again = [*self.study.user_attrs.get("again", []), *self.failed]
        self.study.set_user_attr("again", again)  # the cause may be fixed by now
        raise RunsFailedError(f"{len(self.failed)} runs failed in a row. The last one:\n{error}") from cause


def _next_number(study: Study) -> int:
    """Return the number of the trial that has waited longest."""
    return min((trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,))), default=0)


def _keys(trials: Sequence[FrozenTrial], state: TrialState) -> set[str]:
    return {trial.user_attrs["task"] for trial in trials if trial.state == state and "task" in trial.user_attrs}


def _last_params(trials: Sequence[FrozenTrial], key: str) -> dict[str, Any]:
    """Return the suggested values of a task whose process died, so that the same run is repeated."""
    found = [trial.params for trial in trials if trial.user_attrs.get("task") == key]
    return dict(found[-1]) if found else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off Optuna's messages about each trial."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
