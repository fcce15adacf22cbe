"""Ranks that were given different things, and the law that all ranks log the same values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from distributed_worker import Digits, Sharded, train
from helpers import Memory
from laws_worker import Parallel
from lightning.pytorch import Callback
from ranks_worker import LOGS_RANK_0
from table import ROWS
from torch import nn

from lightning_reg import ActivityPenalty
from lightning_reg._engine.ranks import canonical
from lightning_reg.penalties.activity import penalty_of_all

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*acts on parameters that the optimizer also decays"),
]
WORKER = "ranks_worker.py"


def one_process(callbacks, model, samples, **options):
    """Return what a single process logs, where each batch is the global batch of both ranks."""
    train(callbacks, model, samples, max_epochs=1, logger=Memory(), **options)
    return {key: value.item() for key, value in model.trainer.callback_metrics.items() if key.startswith("reg/")}


@pytest.mark.parametrize("kind", ["DDP", "sharded"])
def test_every_callback_logs_the_same_values_on_every_rank(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    assert first.keys() == second.keys()
    silent = [name for name, metrics in first.items() if not metrics]
    assert len(silent) < 4, silent
    differing = {name for name in first if str(first[name]) != str(second[name])}  # as text, for NaN
    assert not differing


class Activities(Callback):
    """Measures the L1 norm of the outputs of ReLU, as a mean over the samples of each batch."""

    def on_fit_start(self, trainer, pl_module):
        self.batches = []
        for module in pl_module.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(self.measure)

    def on_train_batch_start(self, *args):
        self.batches.append(0.0)

    def measure(self, module, args, output):
        self.batches[-1] += output.detach().abs().sum().item() / len(output)


@pytest.mark.parametrize(("kind", "model"), [("DDP", Digits), ("sharded", Sharded)])
def test_activities_are_a_mean_over_the_samples_of_all_ranks(ranks, kind, model):
    """One process accumulates the batches of both ranks."""
    activities = Activities()
    one_process([ROWS["ActivityPenalty"].active(), activities], model(), [0, 1], accumulate_grad_batches=2)
    found = ranks[0][kind]["ActivityPenalty"]["reg/ActivityPenalty-ReLU/penalty"]
    assert found == pytest.approx(0.1 * sum(activities.batches[-2:]) / 2, rel=1e-4)
    assert found != pytest.approx(0.1 * activities.batches[-1], rel=1e-4)  # those of one rank


@pytest.mark.parametrize("name", ["L2Penalty", "GradientNormClipping", "MaxNorm", "ParameterMonitor", "WeightPruning"])
@pytest.mark.parametrize("kind", ["DDP", "sharded"])
def test_values_are_those_of_one_process(ranks, kind, name):
    model = {"DDP": Digits, "sharded": Sharded}[kind]
    expected = one_process([ROWS[name].active()], model(**ROWS[name].options), [0, 1], accumulate_grad_batches=2)
    found = ranks[0][kind][name]
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-3)


def test_tensor_parallel_ranks_log_the_same_values(ranks):
    """Those of one process, also where each rank has some of the columns of an output."""
    assert ranks[0]["tensor parallel"] == ranks[1]["tensor parallel"]
    expected = one_process([ActivityPenalty(1e-3, modules="net.1")], Parallel(), [0])
    for rank in ranks:
        assert rank["columns"] == pytest.approx(expected, rel=1e-4)


def test_what_users_log_is_averaged(ranks):
    """Each rank has the penalty of its samples, or a metric that others do not have."""
    assert ranks[0]["of samples"] == ranks[1]["of samples"]
    assert ranks[0]["of a user"] == ranks[1]["of a user"] == {"reg/Logs-all/rank": 0.5, "reg/Logs-all/first": 7.0}


@pytest.mark.parametrize("kind", [LOGS_RANK_0, f"{LOGS_RANK_0}, sharded"])
def test_a_logger_on_one_rank_hangs_nothing(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    assert first == second
    assert all(first.values())


def test_fits_of_single_ranks_are_their_own(ranks):
    """While a process group lives. Both ranks train other models, and log other values."""
    first, second = (rank["alone, each"] for rank in ranks)
    assert first != second
    assert first.keys() == second.keys()
    assert ranks[0]["alone, rank 0"] == first
    assert ranks[1]["alone, rank 0"] is None


def test_another_setting_on_one_rank_is_named(ranks):
    for rank in ranks:
        error, seconds = rank["setting"]
        assert error.startswith("the callbacks of rank 1 differ from those of rank 0: L2Penalty(strength=0.2, ")
        assert "is L2Penalty(strength=0.1, " in error
        assert error.endswith("on rank 0; give every rank the same callbacks")
        assert seconds < 30


def test_other_callbacks_on_one_rank_are_named(ranks):
    for rank in ranks:
        error, _ = rank["other callback"]
        assert "rank 1 differ from those of rank 0: it has L1Penalty(" in error
        assert "MaxNorm(" in error
        assert "but rank 0 has L2Penalty(" in error


def test_a_rank_without_callbacks_is_named(ranks):
    error, seconds = ranks[0]["missing"]
    assert error.startswith(
        "rank 1 has started no fit with callbacks of lightning_reg within 3 seconds, while this rank has L2"
    )
    assert seconds < 60


@pytest.mark.parametrize("same", ["same in another order", "same set"])
def test_equal_callbacks_train(ranks, same):
    assert [rank[same][0] for rank in ranks] == ["", ""]


def test_texts_of_arguments_are_equal_in_every_process():
    assert canonical({"b", "a", "c"}) == "{'a', 'b', 'c'}"
    assert canonical(partial(max, 1)) == "functools.partial(<built-in function max>, 1)"
    assert canonical(object()) == "<object object>"
    assert canonical([torch.tensor([1.0, 2.0]), {"p": None}]) == "[tensor([1.0, 2.0]), {'p': None}]"


def test_parts_and_replicas_on_a_mesh():
    """Four ranks: two share their samples, and two such pairs have different samples. Some do not run a module."""
    answers = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 4.0}, {"a": 3.0}, {"a": 4.0}]
    assert penalty_of_all(answers, parts=2) == (3.0 + 7.0) / 2 + 4.0
    assert penalty_of_all(answers, parts=1) == 2.5 + 4.0
