"""Searches: the placebo law, power, what is shown, real training, and bad input."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from synthetic import Helpful, objective, techniques
from test_compare import TRAINER, Linear, loaders

from lightning_reg import DropoutInjection, GradientNoise, L2Penalty, MaxNorm, PeakGradientDropping
from lightning_reg.tuning import Technique, choose
from lightning_reg.tuning.choice import best_setting, confirmation, key_of, setting_of, worth_of
from lightning_reg.tuning.storage import Outcome, open_storage, open_study
from lightning_reg.tuning.techniques import DEFAULT_RANGES, default_techniques

MINE = {"techniques": techniques(), "trials": 20, "mode": "max", "overlap": 0.25, "storage": None, "progress": False}


def studied(study, effect, **options):
    return choose(None, None, run=objective(study, effect), **{**MINE, **options})


@pytest.mark.slow
def test_placebos_are_not_chosen():
    """In at least 95 of 100 studies, and although the search always claims a gain."""
    choices = [studied(study, 0.0) for study in range(100)]
    assert sum(choice.callbacks == [] for choice in choices) >= 95
    assert sum(choice.claimed > 0.5 for choice in choices) >= 75
    assert all((choice.callbacks == []) == (choice.verdict != "better") for choice in choices)


@pytest.mark.slow
def test_a_technique_that_helps_is_found():
    """By 1.5 standard deviations of a run, with runs that correlate by 0.5 and overlap 1/4: in at least 80 of 100 studies."""
    choices = [studied(study, 1.5) for study in range(100)]
    found = [choice for choice in choices if choice.verdict == "better"]
    assert len(found) >= 80
    assert all(any(isinstance(callback, Helpful) for callback in choice.callbacks) for choice in found)
    errors = [choice.differences["chosen"].mean - 1.5 for choice in choices if "Helpful" in choice.kept]
    assert abs(sum(errors) / len(errors)) < 0.15  # what is confirmed is not biased
    claims = [choice.claimed - 1.5 for choice in choices]
    assert sum(claims) / len(claims) > 0.5  # what the search claims is


def found_by(choice):
    """Return what a search found, without how long it took."""
    tried = [(setting_of(trial), trial.value) for trial in choice.trials]
    return tried, choice.kept, choice.worth, choice.claimed, choice.differences, choice.callbacks


def test_the_same_call_chooses_the_same():
    first, second = (studied(3, 1.5) for _ in range(2))
    assert found_by(first) == found_by(second)
    assert found_by(studied(3, 1.5, seed=1)) != found_by(first)


def test_the_search_begins_with_plain_and_explores():
    choice = studied(0, 0.0)
    settings = [setting_of(trial) for trial in choice.trials]
    assert settings[0] == {}
    assert len({key_of(setting) for setting in settings}) > 15
    assert {name for setting in settings for name in setting} == {"Helpful", "Useless", "Placebo"}
    assert choice.claimed == max(trial.value for trial in choice.trials) - choice.trials[0].value


def test_techniques_that_earn_no_place_are_dropped_before_the_confirmation():
    choice = studied(0, 5.0)
    assert choice.kept.keys() == {"Helpful"}
    assert choice.worth["Helpful"].kept
    assert not any(worth.kept for name, worth in choice.worth.items() if name != "Helpful")
    assert choice.splits == list(range(6, 16))
    assert list(choice.runs) == ["plain", "chosen"]


def outcome(value, setting=None, error=""):
    return Outcome(math.nan if error else value, math.nan, math.nan, 0.1, error, {"setting": json.dumps(setting or {})})


def test_of_equal_trials_the_simplest_is_best():
    tried = [outcome(1.0, {"a": {}, "b": {}}), outcome(1.0, {"a": {}}), outcome(2.0, error="failed")]
    assert best_setting(tried, "max") == best_setting(tried, "min") == {"a": {}}
    with pytest.raises(RuntimeError, match="all 1 runs of the search failed; the last one:\nfailed"):
        best_setting(tried[2:], "max")


def test_worth_is_a_mean_with_its_standard_error():
    worth = worth_of([outcome(value) for value in (1.0, 2.0, 3.0)], [outcome(0.0)] * 3, "max")
    assert (worth.mean, worth.kept) == (2.0, True)
    assert worth.error == pytest.approx(1 / math.sqrt(3))
    assert not worth_of([outcome(1.0), outcome(-1.0)], [outcome(0.0)] * 2, "max").kept
    assert worth_of([outcome(1.0)] * 3, [outcome(2.0)] * 3, "min").mean == 1.0


def test_a_study_that_goes_on_confirms_on_new_splits():
    """With half the level, and only if it found something else."""
    with open_storage(None) as opened:
        study = open_study(opened, "s", "max", {})
    first, again = ({"a": {"x": 1}}, {"a": {"x": 2}})
    assert confirmation(study, first, 10) == (list(range(6, 16)), 0.05)
    assert confirmation(study, again, 10) == (list(range(16, 26)), 0.025)
    assert confirmation(study, first, 10) == (list(range(6, 16)), 0.05)
    assert confirmation(study, {}, 10)[0] == []


def test_a_study_in_a_file_goes_on_with_more_trials(tmp_path):
    storage = f"sqlite:///{tmp_path}/new/choose.db"
    calls = []

    def run(callbacks, split, seed):
        calls.append((repr(callbacks), split))
        return objective(1, 1.5)(callbacks, split, seed)

    options = {**MINE, "storage": storage, "run": run}
    first = choose(None, None, **{**options, "trials": 5})
    done = len(calls)
    assert found_by(choose(None, None, **{**options, "trials": 5})) == found_by(first)
    assert len(calls) == done  # nothing is run again
    more = choose(None, None, **{**options, "trials": 8})
    assert more.trials[:5] == first.trials
    assert found_by(more)[0] == found_by(studied(1, 1.5, trials=8))[0]  # as a study that never stopped
    with pytest.raises(ValueError, match=r"study 'choose' was created with other settings: seed \(stored: 0, now: 1\)"):
        choose(None, None, **{**options, "seed": 1})


def test_the_report_shows_what_was_claimed_beside_what_was_confirmed(tmp_path):
    choice = studied(0, 1.5)
    rows = list(choice.table().columns[0].cells)
    assert rows[0] == "claimed by the best of 20 trials"
    assert rows[-1] == "confirmed on 10 new splits"
    assert [row.removesuffix(", left out") for row in rows[1:-1]] == list(choice.worth)
    assert len(choice.figure().axes) == 2
    choice.to_yaml(tmp_path / "reg.yaml")
    assert yaml.safe_load((tmp_path / "reg.yaml").read_text())["trainer"]["callbacks"][0]["class_path"] == "synthetic.Helpful"
    assert len(choice.to_dataframe()) == 20


def test_the_report_where_nothing_is_left():
    choice = next(choice for choice in (studied(study, 0.0) for study in range(20)) if not choice.kept)
    assert (choice.verdict, choice.callbacks, choice.differences) == ("plain", [], {})
    assert "keep plain" in choice.summary()
    assert len(choice.figure().axes) == 2
    assert choice.to_dataframe().empty
    assert "confirmed" not in str(list(choice.table().columns[0].cells))


def test_a_very_small_p_value_is_not_shown_as_zero():
    choice = studied(0, 50.0)
    assert choice.summary() == "Helpful: better than plain (p < 0.001)"


def test_real_training_with_the_default_techniques():
    choice = choose(
        Linear,
        loaders,
        trials=8,
        confirm=3,
        metric="val/loss",
        trainer={**TRAINER, "max_epochs": 1},
        storage=None,
        progress=False,
    )
    assert choice.overlap == pytest.approx(0.25)
    assert not any(trial.error for trial in choice.trials)
    assert len({trial.value for trial in choice.trials}) > 3


def test_the_default_ranges_are_accepted_and_documented():
    assert {technique.name for technique in default_techniques()} == {cls.__name__ for cls in DEFAULT_RANGES} - {
        "DropoutInjection"
    }


def test_values_and_ranges_of_a_technique():
    technique = Technique(
        DropoutInjection, p=FloatDistribution(0.1, 0.5), after="Linear", channelwise=CategoricalDistribution([False, True])
    )
    assert technique.ranges.keys() == {"p", "channelwise"}
    assert repr(technique.build({"p": 0.2, "channelwise": True})) == "DropoutInjection(0.2, after='Linear', channelwise=True)"
    assert Technique(PeakGradientDropping, k=IntDistribution(1, 4)).build({"k": 2}).k == 2
    assert Technique(lambda strength: L2Penalty(strength), name="mine", strength=FloatDistribution(0.0, 1.0)).name == "mine"


STRENGTH = FloatDistribution(1e-5, 1e-2, log=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Technique(L2Penalty, strenght=STRENGTH), TypeError, "no argument 'strenght'; close matches: strength"),
        (
            lambda: Technique(L2Penalty, strength=FloatDistribution(-1, 1)),
            ValueError,
            r"L2Penalty\(strength=-1.0\): .*must be a number",
        ),
        (lambda: Technique(DropoutInjection, p=FloatDistribution(0.1, 1.5), after="ReLU"), ValueError, "p must be a number in"),
        (
            lambda: Technique(PeakGradientDropping, k=FloatDistribution(0.5, 1.5)),
            ValueError,
            "k must be an integer ≥ 0, got 0.5",
        ),
        (lambda: Technique(MaxNorm, max_norm=CategoricalDistribution(["a"])), TypeError, "max_norm must be a number"),
        (lambda: Technique(DropoutInjection, p=FloatDistribution(0.1, 0.5)), TypeError, "after"),
        (lambda: Technique(L2Penalty(1.0)), TypeError, "expected a callback class, as in L2Penalty"),
        (lambda: Technique("L2Penalty"), TypeError, "expected a callback class, as in L2Penalty, got 'L2Penalty'"),
    ],
    ids=range(8),
)
def test_a_distribution_that_does_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, ValueError, "trials must be an integer ≥ 1, got 0"),
        ({"confirm": 2}, ValueError, "confirm must be an integer ≥ 3, got 2"),
        ({"techniques": []}, ValueError, "at least one entry"),
        ({"techniques": "all"}, ValueError, "a list of Technique, or \"default\", got 'all'"),
        ({"techniques": [L2Penalty]}, TypeError, "a list of Technique, but it contains the class L2Penalty"),
        ({"techniques": [*techniques(), *techniques()]}, ValueError, "two techniques have the name 'Helpful'"),
        ({"overlap": None}, ValueError, "run= needs overlap="),
        (
            {"storage": "postgresql+psycopg://nobody:secret@127.0.0.1:1/none"},
            ValueError,
            r"nobody:\*\*\*@127.0.0.1:1/none cannot be",
        ),
        ({"storage": "mysql+missing://host/db"}, ValueError, "cannot be reached|database URL"),
    ],
    ids=range(9),
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        studied(0, 0.0, **options)


def test_a_placebo_that_really_trains():
    """Noise on gradients that is too weak to matter: the values differ, and nothing is chosen."""
    noise = Technique(GradientNoise, std=FloatDistribution(1e-4, 1e-3, log=True))
    choice = choose(
        Linear,
        loaders,
        techniques=[noise],
        trials=4,
        confirm=3,
        metric="val/loss",
        trainer=TRAINER,
        storage=None,
        progress=False,
    )
    assert choice.callbacks == []
    values = [trial.value for trial in choice.trials if setting_of(trial)]
    assert all(one != other for one, other in pairwise(values))
