"""Custom techniques: mistakes in a class raise clear errors, and saved state has a known layout."""

from __future__ import annotations

import collections.abc
import copy
import inspect
import pickle
import pydoc
import typing

import pytest
import torch
from helpers import QUIET, Classifier, Memory, fit, loader, same
from lightning.pytorch import Trainer

import lightning_reg
from lightning_reg import (
    GradientNormClipping,
    L1Penalty,
    L2Penalty,
    QuantileGradientClipping,
    StartingPointPenalty,
    WeightPruning,
    custom,
)
from lightning_reg._engine.state_checks import STATE_LAYOUT
from lightning_reg.custom import (
    NON_NEGATIVE,
    POSITIVE,
    Constraint,
    GradientProcessing,
    ModuleRegularizer,
    ParameterRegularizer,
    Penalty,
    Phase,
    Regularizer,
)


class Huber(Penalty):
    """A correct penalty."""

    valid_ranges = {**Penalty.valid_ranges, "delta": POSITIVE}

    def __init__(self, strength, *, delta=1.0, params="weights", inject="auto", name=None):
        self.delta = delta
        super().__init__(strength, params=params, inject=inject, name=name)

    def value(self, params):
        return sum(
            torch.nn.functional.huber_loss(p, torch.zeros_like(p), reduction="sum", delta=self.current["delta"]) for p in params
        )


def test_correct_class_works():
    callback = Huber(0.1, delta=0.5)
    assert repr(callback) == "Huber(0.1, delta=0.5)"
    assert callback.current == {"strength": 0.1, "delta": 0.5}
    assert not same(fit([callback]), fit())


def test_argument_stored_too_late_raises():
    class Late(Penalty):
        valid_ranges = {**Penalty.valid_ranges, "delta": POSITIVE}

        def __init__(self, strength, delta=1.0):
            super().__init__(strength)
            self.delta = delta

        def value(self, params):
            return sum(p.sum() for p in params)

    message = r"Late.__init__ must store each argument under its own name before it calls super\(\).__init__: add "
    with pytest.raises(TypeError, match=message + "self.delta = delta"):
        Late(0.1)


def test_argument_stored_under_other_name_raises():
    class Renamed(Penalty):
        def __init__(self, strength, delta=1.0, gamma=2.0):
            self._delta, self.g = delta, gamma
            super().__init__(strength)

        def value(self, params):
            return sum(p.sum() for p in params)

    with pytest.raises(TypeError, match=r"Renamed.__init__ must .* add self.delta = delta; self.gamma = gamma"):
        Renamed(0.1)


def test_ranges_without_parent_values_raise():
    message = r"Forgets.valid_ranges leaves out 'strength' of Penalty, .* \{\*\*Penalty.valid_ranges, …\}"
    with pytest.raises(TypeError, match=message):

        class Forgets(Penalty):
            valid_ranges = {"delta": POSITIVE}

            def __init__(self, strength, delta=1.0):
                self.delta = delta
                super().__init__(strength)


def test_ranges_can_omit_fixed_parent_values():
    class Fixed(Penalty):
        valid_ranges = {"weight": NON_NEGATIVE}

        def __init__(self, weight):
            self.weight = weight
            super().__init__(1.0)

        def value(self, params):
            return self.current["weight"] * sum(p.square().sum() for p in params)

    assert repr(Fixed(0.5)) == "Fixed(0.5)"


def with_range(**attributes):
    """Return a penalty class with more attributes."""
    body = {"value": lambda self, params: sum(p.square().sum() for p in params), **attributes}
    return type("Custom", (Penalty,), body)


def stores(*names):
    """Return a constructor that takes a strength and other arguments, and stores some of them."""

    def __init__(self, strength, delta=1.0):  # noqa: N807
        for name in names:
            setattr(self, name, delta)
        Penalty.__init__(self, strength)

    return __init__


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        pytest.param({"valid_ranges": {"strength": (0.0, 1.0)}}, r"valid_ranges\['strength'\] must be an Interval", id="tuple"),
        pytest.param({"valid_ranges": {"power": POSITIVE}}, "leaves out 'strength' of Penalty", id="another key"),
        pytest.param(
            {"valid_ranges": {**Penalty.valid_ranges, "dleta": POSITIVE}, "__init__": stores("delta")},
            "Custom.valid_ranges has dleta, which __init__ does not store",
            id="unknown",
        ),
        pytest.param({"__init__": stores(), "delta": 1.0}, "add self.delta = delta", id="class attribute"),
    ],
)
def test_mistakes_in_a_class_are_named(attributes, message):
    with pytest.raises(TypeError, match=message):
        with_range(**attributes)(0.1)


@pytest.mark.parametrize("name", ["state", "running", "scale", "value", "members"])
def test_an_argument_with_a_name_of_the_base_class_is_refused(name):
    namespace = {"Penalty": Penalty}
    body = f"def __init__(self, strength, {name}=1.0):\n    Penalty.__init__(self, strength)\n"
    exec(body, namespace)
    cls = with_range(__init__=namespace["__init__"])
    expected = "add self.members = members" if name == "members" else f"the argument '{name}' has the same name as an attribute"
    with pytest.raises(TypeError, match=expected):
        cls(0.1)


def test_ranges_are_checked_where_arguments_are_passed_on():
    with pytest.raises(TypeError, match="leaves out 'strength' of Penalty"):

        class Forgets(Penalty):
            valid_ranges = {"delta": POSITIVE}

            def __init__(self, delta, **options):
                self.delta = delta
                super().__init__(**options)


def test_entries_of_state_are_those_of_the_parents_too():
    class More(QuantileGradientClipping):
        state_entries = ("seen",)

    assert set(More(0.5).state) == {"memory", "seen"}


def test_a_class_without_a_phase_or_a_selection_is_refused():
    class NoPhase(ParameterRegularizer):
        def __init__(self):
            super().__init__("weights", None)

        def route(self):
            return "nowhere"

    with pytest.raises(TypeError, match=r"NoPhase must say when it acts in the step: set phase = Phase"):
        NoPhase()
    with pytest.raises(TypeError, match="NoSelection overrides weights, which act on selected parameters, but selects none"):
        type("NoSelection", (Regularizer,), {"weights": lambda self, params, optimizer, step: None})


def test_a_constraint_without_a_projection_is_abstract():
    with pytest.raises(TypeError, match=r"abstract.*reproject"):
        type("Empty", (Constraint,), {})("weights", None)


def test_an_argument_that_is_a_tensor_can_be_shown():
    class Mask(Constraint):
        def __init__(self, mask=None, *, params="weights", name=None):
            self.mask = mask
            super().__init__(params, name)

        def reproject(self, params):
            pass

    assert repr(Mask(torch.tensor([1, 0]))) == "Mask(mask=tensor([1, 0]))"


def test_subclass_can_pass_arguments_on():
    class PassesOn(L1Penalty):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert same(fit([PassesOn(0.01)]), fit([L1Penalty(0.01)]))


def test_custom_namespace():
    bases = {"Penalty", "GradientProcessing", "Constraint", "ParameterRegularizer", "ModuleRegularizer", "Regularizer"}
    assert set(custom.__all__) == bases | {"Phase", "Step", "Interval", "NON_NEGATIVE", "POSITIVE", "PROBABILITY"}
    assert lightning_reg.custom is custom
    for base in (Penalty, GradientProcessing, Constraint, ParameterRegularizer, ModuleRegularizer):
        assert issubclass(base, Regularizer)


class Halves(GradientProcessing):
    """Halves all gradients, and counts the steps of each optimizer in its state."""

    phase = Phase.VALUE_CLIPPING
    state_entries = ("steps",)

    def __init__(self, *, params="all", name=None):
        super().__init__(params, name)

    def gradients(self, params, optimizer, step):
        steps, index = self.state["steps"], self.optimizer_index(optimizer)
        steps[index] = steps.get(index, 0) + 1
        for p in params:
            if p.grad is not None:
                p.grad.div_(2)


def test_state_is_saved_and_reset_by_each_fit(tmp_path):
    callback = Halves()
    fit([callback])
    assert callback.state == {"steps": {0: 8}}
    assert callback.state_dict() == {"layout": STATE_LAYOUT, "metrics": {}, "state": {"steps": {0: 8}}}
    loaded = Halves()
    loaded.load_state_dict(callback.state_dict())
    assert loaded.state == {"steps": {0: 8}}
    fit([callback], max_epochs=1)
    assert callback.state == {"steps": {0: 4}}


@pytest.mark.parametrize(
    ("callback", "model"),
    [
        pytest.param(QuantileGradientClipping(0.5), Classifier(), id="quantile"),
        pytest.param(GradientNormClipping(0.1), Classifier(), id="running metrics"),
        pytest.param(StartingPointPenalty(0.1), Classifier(), id="starting point"),
        pytest.param(WeightPruning(0.5), Classifier(), id="pruning"),
    ],
)
def test_reset_clears_state(callback, model):
    fit([callback], model, logger=Memory(), log_every_n_steps=1)
    assert callback.state_dict()
    callback.reset()
    assert callback.state_dict() == {}


@pytest.mark.parametrize(
    ("saved", "description"),
    [
        pytest.param({"figures": {}, "memory": {}}, r"the keys \['figures', 'memory'\]", id="no layout"),
        pytest.param({"layout": 99, "metrics": {}, "state": {}}, "layout 99", id="another layout"),
    ],
)
def test_checkpoint_of_other_layout_raises(tmp_path, saved, description):
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = Trainer(**options, max_epochs=1, callbacks=[QuantileGradientClipping(0.5)])
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint["callbacks"] = {trainer.callbacks[0].state_key: saved}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed = Trainer(**QUIET, max_epochs=2, callbacks=[QuantileGradientClipping(0.5)])
    with pytest.raises(
        ValueError,
        match=rf"QuantileGradientClipping: .* has {description}, expected layout {STATE_LAYOUT}. Another class or version",
    ):
        resumed.fit(Classifier(), loader(), ckpt_path=tmp_path / "old.ckpt")


def test_state_of_a_subclass_of_its_own_is_resumed():
    class Counts(L1Penalty):
        count = 0

        def state_dict(self):
            return {**super().state_dict(), "count": 3}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.count = state_dict["count"]

    later = Counts(0.1)
    later.load_state_dict(Counts(0.1).state_dict())
    assert later.count == 3


def test_evaluation_accepts_a_checkpoint_of_another_layout(tmp_path):
    class Validates(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("loss", super().training_step(batch, batch_idx))

    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path / "run"}
    trainer = Trainer(**options, max_epochs=1, callbacks=[QuantileGradientClipping(0.5)])
    trainer.fit(Validates(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    checkpoint["callbacks"][trainer.callbacks[0].state_key]["layout"] = 99
    torch.save(checkpoint, tmp_path / "old.ckpt")
    other = Trainer(**options, callbacks=[QuantileGradientClipping(0.5)])
    (result,) = other.validate(Validates(), loader(), ckpt_path=tmp_path / "old.ckpt", weights_only=False)
    assert result["loss"] == trainer.callback_metrics["loss"]


def test_keys_of_callbacks_are_strings_like_any_other():
    one, other = L1Penalty(0.1), L1Penalty(0.2)
    assert one.state_key == other.state_key == copy.deepcopy(one).state_key
    assert pickle.loads(pickle.dumps({one.state_key: 1})) == {other.state_key: 1}
    with pytest.raises(ValueError, match="two callbacks have the name 'L1Penalty': set name='…' for one of them"):
        Trainer(**QUIET, callbacks=[one, other])


@pytest.mark.parametrize("others", [[], [L2Penalty(0.1)]], ids=["alone", "beside an instance"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_class_in_place_of_an_instance_raises(others, checkpointing):
    for callbacks in ([*others, L1Penalty], [L1Penalty, *others]):
        with pytest.raises(TypeError, match=r"must be instances, got the class L1Penalty: .*callbacks=\[L1Penalty\(…\)\]"):
            Trainer(**{**QUIET, "enable_checkpointing": checkpointing}, callbacks=callbacks)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_class_in_place_of_a_list_raises(checkpointing):
    with pytest.raises(TypeError, match=r"must be instances, got the class L1Penalty: .*callbacks=\[L1Penalty\(…\)\]"):
        Trainer(**{**QUIET, "enable_checkpointing": checkpointing}, callbacks=L1Penalty)


def test_classes_are_like_any_other_class():
    """Not iterable, and subscriptable only if they are generic."""
    assert not isinstance(L1Penalty, collections.abc.Iterable)
    with pytest.raises(TypeError, match="type 'L1Penalty' is not subscriptable"):
        L1Penalty[0]

    class Kept(L1Penalty, typing.Generic[typing.TypeVar("T")]):
        pass

    assert typing.get_origin(Kept[int]) is Kept


def test_class_that_a_module_returns_raises():
    model = Classifier()
    model.configure_callbacks = lambda: [L1Penalty]
    with pytest.raises(TypeError, match="must be instances, got the class L1Penalty"):
        fit([], model)


def test_class_can_still_be_inspected():
    assert "The key of its state in a checkpoint" in pydoc.render_doc(L1Penalty)
    assert isinstance(dict(inspect.getmembers(L1Penalty))["state_key"], property)


def test_predict_hooks_are_called_in_pairs_and_only_in_predict():
    calls = []

    class Counts(Regularizer):
        phase = Phase.DROPOUT

        def __init__(self, *, name=None):
            super().__init__(name)

        def start_predict(self, trainer, pl_module):
            calls.append("start")

        def stop_predict(self):
            calls.append("stop")

        def acts_on(self):
            return "predictions"

        def route(self):
            return "forward pass"

    class Predicts(Classifier):
        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[Counts()])
    model = Predicts()
    trainer.fit(model, loader())
    assert calls == []
    trainer.predict(model, loader())
    trainer.fit(model, loader())
    assert calls == ["start", "stop"]


def test_state_key_contains_name_and_is_plain_string():
    callback = L1Penalty(0.1, name="mine")
    assert callback.state_key == L1Penalty(0.1, name="mine")._state_key == "L1Penalty{'name': 'mine'}"
    fit([callback])
    assert type(callback.state_key) is str
