"""Benchmarks: ``python -m tests.benchmarks``. The modules of the tests import each other by their plain names, as in pytest."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "examples")]
