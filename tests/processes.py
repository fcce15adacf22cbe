"""Runs scripts in new processes that import this checkout."""

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
    """Return environment variables that make a process import this checkout's package, test helpers, and examples."""
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
    """Run Python with some arguments and return the finished process, even if it failed."""
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

    If the process fails, the test fails and shows the end of its output.
    """
    process = start(*command, **options)
    if process.returncode:
        pytest.fail(f"{command} failed:\n{process.stdout[-1000:]}\n{process.stderr[-3000:]}", pytrace=False)
    return process.stdout
