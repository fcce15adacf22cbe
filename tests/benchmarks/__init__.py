"""Benchmarks: ``python -m tests.benchmarks``. The modules of the tests import each other by their plain names, as in pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
