"""Makes the helpers and the examples importable, and keeps tests on one thread each."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
torch.set_num_threads(1)
