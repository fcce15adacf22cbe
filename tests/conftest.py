"""Makes the helpers and the examples importable, and keeps tests on one thread each."""

import os
import sys
from pathlib import Path

import torch

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what LightningCLI calls

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
torch.set_num_threads(1)
