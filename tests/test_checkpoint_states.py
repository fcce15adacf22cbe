"""The state of another version, another class, or a damaged file is an error that says so, for every callback."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import Memory, fit
from table import ROWS, every_callback, model

from lightning_reg import L1Penalty, QuantileGradientClipping, StartingPointPenalty, WeightPruning


def saved(row):
    """Return a callback after a fit, and all of its states: with the schedule if it has one, and while metrics are running."""
    callbacks = [row.active(), *([row.scheduled()] if row.scheduled else [])]
    states = []
    for callback in callbacks:
        fit([callback, InMidFit(callback, states)], model(row), max_epochs=1, logger=Memory(), log_every_n_steps=4)
    return [(callback, state) for callback, state in states if state]


class InMidFit(L1Penalty):
    """Keeps the state of another callback after the third batch."""

    def __init__(self, callback, states):
        self.callback, self.states = callback, states
        super().__init__(0.0, name="probe")

    def weights(self, params, optimizer, step):
        if step.number == 2:
            self.states.append((self.callback, copy.deepcopy(self.callback.state_dict())))


def places(value, path=()):
    """Yield the path to each part of a state, from the outside in."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in entries:
        yield from places(part, (*path, key))


def replaced(state, path, change):
    """Return a state with one part changed."""
    if not path:
        return change(state)
    made = list(state) if isinstance(state, (list, tuple)) else dict(state)
    made[path[0]] = replaced(state[path[0]], path[1:], change)
    return type(state)(made) if isinstance(state, tuple) else made


def without(key):
    return lambda part: {name: value for name, value in part.items() if name != key}


def at(state, path):
    for key in path:
        state = state[key]
    return state


def refused(callback, state):
    """Whether a callback refuses a state, with a message that says what to do."""
    fresh = copy.deepcopy(callback)
    fresh.reset()
    try:
        fresh.load_state_dict(state)
    except ValueError as error:
        return all(text in str(error) for text in (f"{callback.name}: the checkpoint's state of this callback cannot", *ADVICE))
    return False


ADVICE = ("Another class or version", "Resume with the version that saved it, or start a new fit from the checkpoint's weights")


OPEN = [("metrics", "sums"), ("metrics", "steps"), ("state",)]
"""Dictionaries whose entries come and go: below them, a missing or further entry may be right."""


def is_open(path):
    return any(path[: len(prefix)] == prefix for prefix in OPEN) and path != ("state",)


@every_callback
def test_malformed_states_are_refused(row):
    for callback, state in saved(row):
        assert not refused(callback, state)
        for garbage in ([1], "state", 3, {"foo": 1}, {**state, "layout": 1}, {**state, "layout": None}):
            assert refused(callback, garbage), garbage
        for path in places(state):
            part = at(state, path)
            if path:
                for wrong in (None, *([] if isinstance(part, str) else ["text"])):
                    assert refused(callback, replaced(state, path, lambda _, wrong=wrong: wrong)), (path, wrong)
            if isinstance(part, dict) and not is_open(path):
                assert refused(callback, replaced(state, path, lambda part: {**part, "foo": 1})), path
                for key in part if path != () else {*part} - {"clock"}:  # constant values need no clock
                    if path != ("state",) or len(part) > 1:  # without any entry, there is no state
                        assert refused(callback, replaced(state, path, without(key))), (path, key)
            if isinstance(part, torch.Tensor) and path[0] == "metrics":
                assert refused(callback, replaced(state, path, lambda part: part.expand(3, 7))), path


def test_states_of_other_classes_are_refused():
    """If they have entries of their own. Names can be equal, so that only the content tells."""
    states = {name: saved(row)[0] for name, row in ROWS.items() if saved(row) and saved(row)[0][1]["state"]}
    assert len(states) >= 6
    for one, other in itertools.permutations(states, 2):
        same_entries = states[one][1]["state"].keys() == states[other][1]["state"].keys()
        if not same_entries:
            assert refused(states[one][0], states[other][1]), (one, other)


def test_memories_of_another_size_are_refused():
    quantile, z_score = (saved(ROWS[name])[0] for name in ("QuantileGradientClipping", "ZScoreGradientClipping"))
    assert refused(z_score[0], quantile[1])
    with pytest.raises(ValueError, match="checkpoint has a window of 3 norms, expected window=1000: resume with window=3"):
        QuantileGradientClipping(0.1).load_state_dict(z_score[1])


@pytest.mark.parametrize("name", ["StartingPointPenalty", "WeightPruning"])
def test_tensors_of_another_shape_are_refused_when_the_fit_starts(name):
    """Once the model is known."""
    callback = ROWS[name].active()
    fit([callback], model(ROWS[name]), max_epochs=1)
    state, fresh = callback.state_dict(), ROWS[name].active()
    other = model(ROWS[name])
    other.net = torch.nn.Sequential(torch.nn.Linear(64, 12), *other.net[1:2], *other.net[2:4], torch.nn.Linear(12, 10))
    other.net[1] = torch.nn.LayerNorm(12)

    class Resumes(L1Penalty):
        """Loads the state as Lightning does: after ``setup``, and before the fit starts."""

        def prepare(self, trainer, pl_module):
            super().prepare(trainer, pl_module)
            fresh.load_state_dict(state)

    with pytest.raises(ValueError, match=rf"^{name}.*net\.0\.weight.* (new callback|another name)"):
        fit([fresh, Resumes(0.0, name="resumes")], other, max_epochs=1)


def test_evaluation_needs_no_state():
    """Whatever it is."""
    callback = WeightPruning(0.5)
    callback._evaluating = True
    for state in ([1], {"layout": 1}, StartingPointPenalty(0.1).state_dict()):
        callback.load_state_dict(state)
