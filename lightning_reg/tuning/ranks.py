"""Runs under DDP, where Lightning starts the script again for each further rank.

Rank 0 decides what to run, stores the outcomes, and tells the other ranks. Before the first fit, there are no other ranks and
no process group. A file, whose path they inherit in their environment, holds what they have missed.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

VARIABLE = "LIGHTNING_REG_TUNING_FILE"

_finished: list[dict[str, Any]] = []
"""The outcomes of each set of tasks that this process has finished, in order."""


def follows() -> bool:
    """Return whether this process is a rank that follows rank 0."""
    return dist.get_rank() > 0 if _is_joint() else VARIABLE in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def follow(execute: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Run what rank 0 runs until a set of tasks is done, and return its outcomes."""
    if not _is_joint():
        missed = pickle.loads(Path(os.environ[VARIABLE]).read_bytes())  # of the parent process
        if len(_finished) < len(missed["finished"]):
            _finished.append(missed["finished"][len(_finished)])
            return _finished[-1]
        _try(execute, missed["values"])
    while True:
        kind, content = _hear()
        if kind == "failed":
            raise RuntimeError(content)
        if kind == "finished":
            _finished.append(content)
            return _finished[-1]
        _try(execute, content)


def _hear() -> tuple[str, Any]:
    """Wait for a message from rank 0."""
    message: list[Any] = [None]
    dist.broadcast_object_list(message)
    kind, content = message[0]
    return kind, content


class Leader:
    """Tells other ranks what to do, in a ``with`` statement around a set of tasks.

    Example:
        >>> with Leader() as leader:
        ...     leader.tell({"split": 0})  # nobody follows
    """

    def __enter__(self) -> Leader:
        self._folder = tempfile.TemporaryDirectory(prefix="lightning_reg_")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and _is_joint():
            dist.broadcast_object_list([("failed", str(error))])
        if os.environ.get(VARIABLE, "").startswith(self._folder.name):
            del os.environ[VARIABLE]
        self._folder.cleanup()

    def tell(self, values: dict[str, Any]) -> None:
        """Announce the next run to the existing ranks, or to those that the run will start."""
        if _is_joint():
            dist.broadcast_object_list([("run", values)])
            return
        path = Path(self._folder.name) / "missed"
        path.write_bytes(pickle.dumps({"finished": _finished, "values": values}))
        os.environ[VARIABLE] = str(path)

    def finish(self, outcomes: dict[str, Any]) -> None:
        """Announce that all tasks are done."""
        _finished.append(outcomes)
        if _is_joint():
            dist.broadcast_object_list([("finished", outcomes)])


def _is_joint() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _try(execute: Callable[[dict[str, Any]], float], values: dict[str, Any]) -> None:
    """Run, and ignore failures, which also occur on rank 0, where the reason is stored."""
    with suppress(Exception):
        execute(values)
