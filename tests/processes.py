"""Runs scripts in new processes, with the checkout that the tests are in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent


def environment(threads: int = 1, columns: int = 120) -> dict[str, str]:
    """Return the variables of a process that imports the package, the helpers, and the examples of this checkout."""
    paths = [str(ROOT), str(HERE), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "COLUMNS": str(columns),
    }


def start(
    *command: str, folder: Path | None = None, threads: int = 1, columns: int = 120, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python with some arguments to its end, whatever that is."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(threads, columns),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_script(*command: str, **options: Any) -> str:
    """Run Python with some arguments and the options of ``start``; return what it printed.

    A process that fails makes the test fail, with what it printed last.
    """
    done = start(*command, **options)
    if done.returncode:
        pytest.fail(f"{command} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}", pytrace=False)
    return done.stdout
