"""Laws that hold for every callback of the suite, over one table."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import random
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from helpers import QUIET, Classifier, Gan, Memory, distance, fit, loader, same, traces, vars_of, weights
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from table import ROWS, SEED, SETS, changes, every_callback, everything, model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lightning_reg
from lightning_reg import Cubic, L1Penalty, L2Penalty, RandomShrinkage, WeightPruning
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg.dropout import rates

with_parts = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.parts])
scheduled = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in ROWS.items() if row.scheduled])


def test_every_public_callback_has_a_row():
    public = [getattr(lightning_reg, name) for name in lightning_reg.__all__]
    callbacks = {cls.__name__ for cls in public if isinstance(cls, type) and issubclass(cls, Regularizer)}
    assert callbacks - {"Penalty"} == set(ROWS)  # abstract
    for name, row in ROWS.items():
        assert {type(callback).__name__ for callback in row.all()} == {name}


@every_callback
def test_active_changes_training_and_inactive_does_not(row):
    plain, active = (fit(callbacks, model(row)) for callbacks in ([], [row.active()]))
    assert same(active, plain) is not changes(row)
    assert row.inactive or "inactive" in row.exempt
    if row.inactive:
        assert same(fit([row.inactive()], model(row)), plain)


class Copies(Callback):
    """Copies and pickles a callback in the middle of a fit."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            self.copies = [copy.deepcopy(self.callback), pickle.loads(pickle.dumps(self.callback))]
            self.held = parts_of_fit(self.callback, trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        self.fit = trainer, pl_module


def parts_of_fit(held, trainer, pl_module):
    """Return the classes of what a pickle would contain of a fit."""
    parts = {id(part) for part in (trainer, *trainer.optimizers, *pl_module.modules(), *pl_module.parameters())}
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, obj):
            return found.append(type(obj).__name__) or "part" if id(obj) in parts else None

    Finder(io.BytesIO()).dump(held)
    return found


@every_callback
def test_copies_contain_nothing_of_the_fit(row):
    """A model that keeps its callbacks in its hyperparameters writes them into each checkpoint."""
    callback = row.scheduled() if row.scheduled else row.active()
    probe = Copies(callback)
    expected = fit([callback, probe], model(row))
    assert probe.held == []
    assert parts_of_fit(vars(callback), *probe.fit) == []
    for copied in probe.copies:
        copied.reset()
        assert same(fit([L1Penalty(0.0, name="first"), copied], model(row)), expected)


def held_of_a_run(root):
    """Return the classes of what is reachable from an object and belongs to a run, by the garbage collector's references."""
    found, seen, waiting = set(), {}, [root]
    while waiting:
        held = waiting.pop()
        if id(held) in seen or isinstance(held, (type, types.ModuleType)):
            continue
        seen[id(held)] = held
        if isinstance(held, (Trainer, torch.optim.Optimizer, nn.Module, nn.Parameter)):
            found.add(type(held).__name__)
        elif isinstance(held, types.FunctionType):
            waiting += held.__closure__ or ()
        else:
            waiting += gc.get_referents(held)
    return found


class Fails(Classifier):
    """A model whose third batch is an error."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("stop")
        return super().training_step(batch, batch_idx)


@every_callback
def test_callbacks_release_everything_of_a_run(row):
    """After a fit, after one that failed, and after predictions."""
    callback = row.active()
    during = Copies(callback)
    during.on_train_batch_end = lambda *args: during.__dict__.setdefault("found", held_of_a_run(callback))
    trainer, trained = Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [callback, during]}), model(row, Evaluates)
    trainer.fit(trained, loader(), loader())
    assert {"Trainer", "Evaluates"} & during.found  # the search finds what there is
    assert held_of_a_run(callback) == set()
    trainer.predict(trained, loader())
    assert held_of_a_run(callback) == set()
    with pytest.raises(RuntimeError, match="stop"):
        fit([callback], model(row, Fails))
    assert held_of_a_run(callback) == set()


@scheduled
def test_schedule_changes_training(row):
    plain, changing, active = (fit(callbacks, model(row)) for callbacks in ([], [row.scheduled()], [row.active()]))
    assert not same(changing, plain)
    assert not same(changing, active)


def test_order_of_callbacks_does_not_matter():
    reference = fit(everything())
    for seed in range(5):
        callbacks = everything()
        random.Random(seed).shuffle(callbacks)
        assert same(fit(callbacks), reference), callbacks


def test_order_of_penalties_does_not_matter():
    """Floating-point addition is not associative, so three penalties would reveal their order."""
    penalties = [L1Penalty(0.013), L2Penalty(0.17), L1Penalty(0.0071, params="net.4.*")]
    for route in ("loss", "gradient"):
        for callback in penalties:
            callback.inject = route
        results = [fit([copy.deepcopy(cb) for cb in order]) for order in itertools.permutations(penalties)]
        assert all(same(result, results[0]) for result in results)


@every_callback
def test_accumulation_does_not_matter(row):
    if "accumulation" in row.exempt:
        pytest.skip(row.exempt["accumulation"])

    def without_dropout():  # its masks would differ
        classifier = model(row)
        classifier.net[3].p = 0.0
        return classifier

    once = fit([row.active()], without_dropout(), loader(64, batch_size=32))
    in_parts = fit([row.active()], without_dropout(), loader(64, batch_size=8), accumulate_grad_batches=4)
    assert_close(weights(in_parts), weights(once))


random_sets = pytest.mark.parametrize("names", [pytest.param(names, id=f"seed {SEED}, {' '.join(names)}") for names in SETS])


@random_sets
def test_accumulation_does_not_matter_for_sets(names):
    def trained(**options):
        classifier = Classifier()
        classifier.net[3].p = 0.0
        callbacks = [ROWS[name].active() for name in names if "Dropout" not in name]
        return weights(fit(callbacks, classifier, **options))

    once = trained(data=loader(64, batch_size=32))
    assert_close(trained(data=loader(64, batch_size=8), accumulate_grad_batches=4), once)


@random_sets
def test_order_of_sets_does_not_matter(names):
    callbacks = [ROWS[name].active() for name in names]
    reordered = [ROWS[name].active() for name in reversed(names)]
    assert same(fit(callbacks), fit(reordered))


def scaled(callback, row, scale):
    """Train in float16 with a loss scale and return the weights."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    return weights(fit([callback], model(row), max_epochs=1, plugins=[plugin]))


class Naive(Callback):
    """A naive penalty."""

    def on_before_backward(self, trainer, pl_module, loss):
        loss.add_(0.1 * sum(p.square().sum() for p in pl_module.parameters()))


@every_callback
def test_loss_scale_does_not_matter(row):
    low, high = (scaled(row.active(), row, scale) for scale in (2.0**8, 2.0**12))
    assert_close(low, high, rtol=1e-3, atol=1e-4)


def test_loss_scale_matters_for_naive_penalty():
    low, high = (scaled(Naive(), ROWS["L2Penalty"], scale) for scale in (2.0**8, 2.0**12))
    with pytest.raises(AssertionError):
        assert_close(low, high, rtol=1e-3, atol=1e-4)


class TwoDropouts(Classifier):
    """The model with a second dropout layer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.extra = nn.Dropout(0.1)

    def training_step(self, batch, batch_idx):
        return super().training_step((self.extra(batch[0]), batch[1]), batch_idx)


@with_parts
def test_two_callbacks_act_on_separate_parts(row):
    first, second = row.parts()
    assert first.name != second.name
    assert first.state_key != second.state_key
    both = fit([first, second], TwoDropouts())
    assert same(both, fit([second, first], TwoDropouts()))
    assert same(both, fit([row.parts()[0]], TwoDropouts())) is not changes(row)
    assert same(both, fit([row.parts()[1]], TwoDropouts())) is not changes(row)


class StateCheck(Callback):
    """Checks that evaluation does not change the state of the module."""

    def on_validation_start(self, trainer, pl_module):
        self.before = copy.deepcopy(pl_module.state_dict())

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer, pl_module):
        after = pl_module.state_dict()
        assert self.before.keys() == after.keys()
        assert all(torch.equal(self.before[key], after[key]) for key in after)

    on_test_end = on_predict_end = on_validation_end


class Evaluates(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", super().training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.outputs = self.net(batch[0])

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@every_callback
def test_evaluation_is_unchanged(row):
    trained, plain = model(row, Evaluates), model(row, Evaluates)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, callbacks=[row.active(), StateCheck()]
    )
    plain_trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for evaluate in ("validate", "test", "predict"):
        results = [getattr(t, evaluate)(m, loader()) for t, m in ((trainer, trained), (plain_trainer, plain))]
        changed = pytest.raises(AssertionError) if "predictions" in row.exempt and evaluate == "predict" else nullcontext()
        with changed:
            assert_close(results[0], results[1], rtol=0.0, atol=0.0)
    trainer.fit(trained, loader(), loader())


@every_callback
def test_fit_leaves_no_trace_and_can_be_repeated(row):
    trained, callback = model(row), row.active()
    before = traces(trained)
    fit([callback], trained)
    assert traces(trained) == before
    again = fit([callback], trained)
    assert traces(trained) == before
    fresh = fit([row.active()], fit([row.active()], model(row)))
    assert same(again, fresh) is ("second_fit" not in row.exempt)


@every_callback
def test_fit_leaves_no_optimizer_hooks(row):
    class Keeps(Classifier):
        def configure_optimizers(self):
            self.optimizer = super().configure_optimizers()
            return self.optimizer

    optimizer = fit([row.active()], model(row, Keeps)).optimizer
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert [group["weight_decay"] for group in optimizer.param_groups] == [row.options.get("weight_decay", 0.0)]


@every_callback
def test_exception_leaves_no_trace(row):
    failed = model(row, Fails)
    before = traces(failed)
    with pytest.raises(RuntimeError, match="stop"):
        fit([row.active()], failed)
    assert traces(failed) == before


@every_callback
def test_only_parameters_of_stepping_optimizer_change(row):
    if "several_optimizers" in row.exempt:
        with pytest.raises(ValueError, match="manual optimization"):
            fit([row.active()], Gan(**row.options))
        return
    trained = fit([row.active()], Gan(stepping=(1,), **row.options))
    assert_close(weights(trained.net[0]), weights(Gan().net[0]), rtol=0.0, atol=0.0)
    assert not same(trained.net[4], Gan().net[4])
    assert same(fit([row.active()], Gan(**row.options)), fit(model=Gan(**row.options))) is not changes(row)


class Awkward(Classifier):
    """Frozen, tied, unused, empty and scalar parameters, and a sparse embedding."""

    def __init__(self, **options):
        super().__init__(**options)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.tied = nn.Linear(64, 16, bias=False)
        self.tied.weight = self.net[0].weight
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.sparse = nn.Embedding(10, 1, sparse=True)
        nn.init.constant_(self.unused.weight, 0.5)
        nn.init.constant_(self.frozen.weight, 0.5)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return super().training_step((images + self.tied(images).mean() * self.scalar + self.sparse(labels), labels), batch_idx)


@pytest.mark.filterwarnings("ignore:.*which will not learn")
@every_callback
def test_awkward_parameters_are_supported(row):
    options = {"momentum": 0.0}  # torch's SGD has neither momentum nor weight decay for sparse gradients
    trained = Awkward(**options, **row.options)
    if "sparse_gradients" in row.exempt:
        with pytest.raises((ValueError, RuntimeError), match=r"create sparse with sparse=False|add\(sparse, dense\)"):
            fit([row.active()], trained)
        trained = Awkward(**options, **row.options)
        trained.sparse.sparse = False
    fit([row.active()], trained)
    assert torch.equal(trained.frozen.weight, torch.full((3, 3), 0.5))
    assert trained.tied.weight is trained.net[0].weight
    assert all(p.isfinite().all() for p in trained.parameters())


class Lazy(Classifier):
    """A model whose first layer gets its shape from the first batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[0] = nn.LazyLinear(16)


@pytest.mark.filterwarnings("ignore:.*Lazy modules", "ignore:.*layer with uninitialized parameters")
@every_callback
def test_lazy_modules_are_trained(row):
    if "lazy_modules" in row.exempt:
        with pytest.raises(ValueError, match="lazy module"):
            fit([row.active()], model(row, Lazy))
        return
    trained = fit([row.active()], model(row, Lazy), max_epochs=1)
    assert all(p.isfinite().all() for p in trained.parameters())


@every_callback
def test_half_precision_training_is_close(row):
    """Training in bfloat16 is much closer to float32 than to training without the callback."""
    half = fit([row.active()], model(row), precision="bf16-true", max_epochs=1)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    if not changes(row):
        assert same(half, fit([], model(row), precision="bf16-true", max_epochs=1))
        return
    full, plain = (fit(callbacks, model(row), max_epochs=1) for callbacks in ([row.active()], []))
    assert distance(half, full) < 0.5 * distance(plain, full)


@every_callback
def test_double_precision_training(row):
    """Close to float32 up to rounding, and an inactive callback changes no bit of a float64 run."""
    data = DataLoader([(images.double(), labels) for images, labels in loader().dataset], batch_size=16)
    double = fit([row.active()], model(row), data, precision="64-true", max_epochs=1)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    single = fit([row.active()], model(row), max_epochs=1)
    assert distance(double, single) < 1e-3
    if row.inactive:
        inactive, plain = (fit(cbs, model(row), data, precision="64-true", max_epochs=1) for cbs in ([row.inactive()], []))
        assert same(inactive, plain)


@every_callback
def test_checkpoint_loads_into_plain_model(row, tmp_path):
    trained = model(row)
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path, callbacks=[row.active()])
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert same(Classifier.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu"), trained)


@every_callback
def test_compiled_training_matches_eager(row, monkeypatch):
    def compiled_model():
        classifier = model(row)
        classifier.net = torch.compile(classifier.net, backend="aot_eager")
        return classifier

    trained = dict(fit([row.active()], compiled_model(), max_epochs=1).named_parameters())
    monkeypatch.setattr(rates, "is_compiling", lambda: True)  # makes eager code draw the masks of compiled code
    eager = dict(fit([row.active()], model(row), max_epochs=1).named_parameters())
    assert_close({name.replace("_orig_mod.", ""): p for name, p in trained.items()}, eager)


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "EMA on epochs": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=1000, update_starting_at_epoch=0),
}


@every_callback
def test_works_with_weight_averaging(row):
    for average in AVERAGES.values():
        together = fit([row.active(), average()], model(row), max_epochs=3)
        assert all(p.isfinite().all() for p in together.parameters())
        assert same(together, fit([average()], model(row), max_epochs=3)) is not changes(row)


EPOCH_ENDS = {
    "shrinkage": lambda: [RandomShrinkage(0.2, every="epoch")],
    "pruning": lambda: [WeightPruning(Cubic(0.0, 0.8))],
    "rewinding": lambda: [WeightPruning(Cubic(0.0, 0.8), rewind_to_step=2)],
    "pruning by steps": lambda: [WeightPruning(Cubic(0.0, 0.8), every="3st", rewind_to_step=1)],
    "everything": everything,
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", EPOCH_ENDS)
def test_order_beside_weight_averaging_does_not_matter(name, average):
    """Averages are taken after an epoch's end, wherever the callbacks stand."""

    def trained(kind, at):
        callbacks = EPOCH_ENDS[name]()
        callbacks.insert(at, AVERAGES[average]())
        return fit(callbacks, kind(), max_epochs=3)

    results = [trained(kind, at) for kind in (Classifier, Validated) for at in (0, 10, 100)]
    assert all(same(result, results[0]) for result in results)
    assert not same(results[0], fit(EPOCH_ENDS[name](), max_epochs=3))


class Validated(Classifier):
    """The model with a validation, in which weight averaging swaps the weights."""

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return loader(16)


class SyncCounter(TorchDispatchMode):
    """Counts how often the CPU waits for a number from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def count_syncs(callbacks, row, batches):
    classifier = model(row)
    classifier.lr = torch.tensor(classifier.lr)  # a learning rate on the device, as graph capture needs it
    with SyncCounter() as mode:
        fit(callbacks, classifier, loader(16 * batches), max_epochs=1, logger=Memory(), log_every_n_steps=16)
    return mode.count


@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")
@every_callback
def test_no_device_sync_per_step(row, monkeypatch):
    """Counts the syncs that four more unlogged steps add. One-time syncs do not count."""
    for module in [module for name, module in sys.modules.items() if name.startswith("lightning_reg.")]:
        if hasattr(module, "is_cpu"):
            monkeypatch.setattr(module, "is_cpu", lambda tensor: False)  # as if there were a device
    plain, ours = (
        count_syncs(callbacks(), row, 8) - count_syncs(callbacks(), row, 4) for callbacks in (list, lambda: [row.active()])
    )
    assert (ours > plain) is ("waits" in row.exempt)


@every_callback
def test_repr_round_trips(row):
    for callback in row.all():
        again = eval(repr(callback), vars(lightning_reg) | {"inf": float("inf")})
        assert repr(again) == repr(callback)
        assert again.name == callback.name
    named = type(row.active())(**{**vars_of(row.active()), "name": "mine"})
    assert repr(named).endswith("name='mine')")
    assert named.state_key != row.active().state_key
