"""Runs a script of the tests in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def environment(threads: int = 1, columns: int = 120) -> dict[str, str]:
    """Return the variables of a process that can import the helpers and the examples."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "examples")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "COLUMNS": str(columns)}


def run_script(*command: str, folder: Path | None = None, threads: int = 1, columns: int = 120, timeout: int = 300) -> str:
    """Run Python with some arguments, the helpers and the examples being importable; return what it printed.

    A process that fails makes the test fail, with what it printed last.
    """
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(threads, columns),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{command} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}", pytrace=False)
    return done.stdout
