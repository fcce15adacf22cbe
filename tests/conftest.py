"""Starts ranks, and keeps tests on one thread each."""

import os

import pytest
import torch
from processes import HERE, run_script

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what LightningCLI calls
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_ranks():
    """Return what starts a script of the tests in two ranks: the arguments of Python, for ``processes``."""

    def arguments(script):
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / script)]

    return arguments


@pytest.fixture(scope="module")
def ranks(request, two_ranks, tmp_path_factory):
    """Return what each of two ranks saved, of the script that the module names as its ``WORKER``."""
    folder = tmp_path_factory.mktemp("ranks")
    run_script(*two_ranks(request.module.WORKER), str(folder), timeout=600)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
