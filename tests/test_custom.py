"""Custom techniques: mistakes in a class raise clear errors, and saved state has a known layout."""

from __future__ import annotations

import pytest
import torch
from helpers import QUIET, Classifier, Memory, fit, loader, same
from lightning.pytorch import Trainer

import lightning_reg
from lightning_reg import (
    GradientNormClipping,
    L1Penalty,
    QuantileGradientClipping,
    StartingPointPenalty,
    WeightPruning,
    custom,
)
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
        return sum(torch.nn.functional.huber_loss(p, torch.zeros_like(p), reduction="sum", delta=self.delta) for p in params)


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
    assert callback.state_dict() == {"layout": 1, "metrics": {}, "state": {"steps": {0: 8}}}
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
        ValueError, match=rf"QuantileGradientClipping: .* has {description}, expected layout 1: another version"
    ):
        resumed.fit(Classifier(), loader(), ckpt_path=tmp_path / "old.ckpt")


def test_state_key_contains_name_and_is_plain_string():
    callback = L1Penalty(0.1, name="mine")
    assert callback.state_key == L1Penalty(0.1, name="mine")._state_key == "L1Penalty{'name': 'mine'}"
    fit([callback])
    assert type(callback.state_key) is str
