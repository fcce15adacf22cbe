"""``pytorch_lightning`` drives every callback as ``lightning.pytorch`` does, to the last bit, whichever is imported first."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers import Classifier
from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.demos.boring_classes import BoringModel
from processes import run_script
from table import ROWS, everything

from lightning_reg._engine import _lightning

NEW, OLD = "lightning.pytorch", "pytorch_lightning"


@pytest.fixture(scope="module", params=[OLD, "lightning_reg"], ids="{} first".format)
def runs(request, tmp_path_factory):
    """Return what ``pytorch_lightning_worker.py`` saves, by package, with the package that it imported first."""
    folder = tmp_path_factory.mktemp("runs")
    run_script("-m", "pytorch_lightning_worker", request.param, str(folder), str(folder / "runs.json"))
    return {**json.loads((folder / "runs.json").read_text()), "first": request.param}


def test_it_is_not_imported_by_this_package(runs):
    assert (OLD in runs["loaded at first"]) == (runs["first"] == OLD)
    assert ("lightning_reg" in runs["loaded at first"]) == (runs["first"] != OLD)


@pytest.mark.parametrize("name", ROWS)
def test_every_callback_trains_alike(runs, name):
    """The same weights, metrics, and names of metrics."""
    new, old = (runs[package][f"active {name}"] for package in (NEW, OLD))
    assert old == new
    if "validates" in ROWS[name].options:
        assert {key for metrics in old["logged"].values() for key in metrics} - {"epoch"} == old["monitored"].keys()
    else:
        assert old["logged"].get("0", {}).keys() - {"epoch"} == old["monitored"].keys()
    if "changes_training" not in ROWS[name].exempt:
        assert old["weights"] != runs[OLD]["plain"]["weights"]


@pytest.mark.parametrize("name", ROWS)
def test_every_callback_resumes_alike_in_both_packages(runs, name):
    """From the checkpoint of either, while accumulation changes."""
    new, old = (runs[package][f"resumed {name}"] for package in (NEW, OLD))
    assert old == new
    logged = old["whole"]["logged"]  # four steps of one batch, two of two batches
    assert list(logged) == {"OverfittingMonitor": ["3", "5"], "MonteCarloDropout": []}.get(name, list("012345"))
    for rest in old["rests"]:
        assert rest["weights"] == old["whole"]["weights"]
        assert rest["logged"] == {step: metrics for step, metrics in logged.items() if step > "3"}


def test_schedules_count_the_steps_of_a_changing_accumulation(runs):
    """The sixth step, four of one batch and two of two batches, ends with the eighth batch."""
    assert runs[OLD]["steps"] == runs[NEW]["steps"]
    strengths = [metrics["reg/L1Penalty/strength"] for metrics in runs[OLD]["steps"]["logged"].values()]
    assert strengths == pytest.approx([0.6 * batch / 8 for batch in (0, 1, 2, 3, 4, 6)])


@pytest.mark.parametrize("what", ["everything", "layers built later", "predictions", "left", "warned", "strategies"])
def test_everything_else_is_alike(runs, what):
    assert "traceback" not in runs[NEW][what]
    assert runs[OLD][what] == runs[NEW][what]


@pytest.mark.parametrize("callback", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_are_alike(runs, callback):
    new, old = (runs[package][f"averaged by {callback}"] for package in (NEW, OLD))
    assert old == new
    assert old["logged"]["15"]["reg/to the end/strength"] == pytest.approx(0.1 * 15 / 16)  # SWA's fifth epoch does not count


def test_predictions_are_samples(runs):
    sampled, plain = runs[OLD]["predictions"]
    assert [len(batch) for batch in sampled] == [3, 3]
    assert sampled[0][0] != sampled[0][1]
    assert [len(batch) for batch in plain] == [16, 16]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parameter", "ValueError: L1Penalty: params: no parameter has a name that matches 'net.0.weights'; close matches: "),
        ("modules", "ValueError: ActivityPenalty: no module has a name or class that matches 'RelU'; close matches: ReLU"),
        ("dropout", "ValueError: DropoutScheduler: no module with dropout has a name or class that matches 'net.33'"),
    ],
    ids=["parameter", "modules", "dropout"],
)
def test_mistakes_have_the_same_messages(runs, what, message):
    assert runs[OLD][f"mistyped {what}"] == runs[NEW][f"mistyped {what}"]
    assert runs[OLD][f"mistyped {what}"].startswith(message)


def test_two_of_one_name_are_refused(runs):
    assert runs[OLD]["same name"] == runs[NEW]["same name"]
    assert "two callbacks have the name 'L1Penalty': set name='…' for one of them" in runs[OLD]["same name"]


def test_a_class_in_place_of_an_instance_is_refused(runs):
    assert runs[OLD]["class"] == runs[NEW]["class"]
    assert runs[OLD]["class"].startswith("TypeError: callbacks must be instances, got the class L1Penalty")


def test_the_summary_is_printed(runs):
    assert runs[OLD]["summary"] == runs[NEW]["summary"]
    assert "L1Penalty" in runs[OLD]["summary"]
    assert "WeightPruning: 50.00% of 1,184 weights are pruned" in runs[OLD]["summary"]
    assert runs[OLD]["no summary"] == ""


def test_a_failed_fit_leaves_nothing(runs):
    message, hooks, keys, p, is_wrapped = runs[OLD]["left"]
    assert message == "RuntimeError: in the second batch"
    assert keys == list(Classifier().state_dict())
    assert (hooks, p, is_wrapped) == ([], 0.1, False)


def test_strategies_are_recognized(runs):
    """FSDP1 and DeepSpeed; the third is DDP."""
    assert runs[OLD]["strategies"] == [[True, False], [False, True], [False, False]]


def test_warnings_are_of_the_same_category(runs):
    assert runs[OLD]["warned"] == ["UserWarning: L1Penalty-net_0 has no effect for now: all 2 selected parameters are frozen"]


@pytest.mark.parametrize("source", ["flags", "yaml"])
def test_the_command_line_takes_every_callback(runs, source):
    """The worker has made callbacks before, so the order of imports does not matter to it."""
    new, old = (runs[package]["command line"][source] for package in (NEW, OLD))
    assert old == new
    assert old["made"] == list(map(repr, everything()))


COMMAND_LINE = """
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
{imported}
flags = ["--trainer.logger=false", "--trainer.callbacks+={name}", "--trainer.callbacks.strength=0.1"]
try:
    print(LightningCLI(BoringModel, args=flags, run=False).trainer.callbacks[0])
except SystemExit:
    import lightning_reg, pytorch_lightning
    print(issubclass(lightning_reg.L1Penalty, pytorch_lightning.Callback))
    callbacks = [lightning_reg.L1Penalty(0.1), lightning_reg.WeightPruning(0.5)]
    print(issubclass(lightning_reg.L1Penalty, pytorch_lightning.Callback))
    print(pytorch_lightning.Trainer(logger=False, callbacks=callbacks).callbacks[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L1Penalty", "lightning_reg.L1Penalty"])
def test_the_command_line_takes_callbacks_that_are_imported_after_it(name):
    """Where a script does not import the package, a full name on the command line does."""
    script = COMMAND_LINE.format(name=name, imported="import lightning_reg" if name == "L1Penalty" else "")
    assert run_script("-c", script).splitlines()[-1] == "L1Penalty(0.1)"


@pytest.mark.slow
def test_the_command_line_refuses_callbacks_that_are_imported_before_it():
    """As the documentation says. A Trainer in Python takes them, since the callbacks are made after both imports."""
    script = "import lightning_reg\n" + COMMAND_LINE.format(name="lightning_reg.L1Penalty", imported="")
    assert run_script("-c", script).splitlines()[-3:] == ["False", "True", "L1Penalty(0.1)"]


def test_classes_are_recognized_by_name_and_package():
    class ModelSummary:
        pass

    class Richer(RichModelSummary):
        pass

    assert _lightning.is_instance_of(Richer(), "ModelSummary")
    assert not _lightning.is_instance_of(ModelSummary(), "ModelSummary")
    assert not _lightning.is_instance_of(Richer(), "StochasticWeightAveraging")
    assert not _lightning.prints_summary(SimpleNamespace(is_global_zero=True, callbacks=[ModelSummary()]))


def test_hooks_are_recognized_where_they_are_defined():
    class Later(BoringModel):
        def configure_model(self):
            pass

    replaced = Classifier()
    replaced.setup = lambda stage: None
    assert [_lightning.builds_modules_later(m) for m in (Classifier(), Later(), replaced)] == [False, True, True]
