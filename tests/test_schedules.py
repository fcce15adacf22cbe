from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import fit, loader

from lightning_reg import Cosine, Cubic, Exponential, L1Penalty, Linear, SequentialSchedule, Steps
from lightning_reg._engine.clock import Clock
from lightning_reg._engine.plan import Plan, Point

GRID = np.linspace(0.0, 1.0, 41)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Linear(1.0, 3.0), lambda x: np.interp(x, [0, 1], [1, 3])),
        (Linear(1.0, 3.0, begin=0.25, until=0.75), lambda x: np.interp(x, [0.25, 0.75], [1, 3])),
        (Cosine(1.0, 3.0), lambda x: 1 + 2 * np.sin(np.pi * x / 2) ** 2),
        (Cubic(0.0, 0.8, until=0.5), lambda x: 0.8 - 0.8 * (1 - np.clip(2 * x, 0, 1)) ** 3),
        (Exponential(1.0, 1e-4), lambda x: np.logspace(0, -4, len(x))),
        (Steps([0.5, 0.1, 0.0], at=[0.25, 0.75]), lambda x: np.select([x < 0.25, x < 0.75], [0.5, 0.1], 0.0)),
        (
            SequentialSchedule([Linear(1.0, 3.0), 0.5, lambda x: x**2, Steps([4, 5], at=[0.5])], at=[0.25, 0.5, 0.75]),
            lambda x: np.select(
                [x < 0.25, x < 0.5, x < 0.75, x < 0.875], [1 + 8 * x, 0.5 + 0 * x, (4 * x - 2) ** 2, 4 + 0 * x], 5
            ),
        ),
        (
            SequentialSchedule([SequentialSchedule([0.0, Linear(0.0, 1.0, begin=0.5)], at=[0.5]), Cosine(1.0, 0.0)], at=[0.8]),
            lambda x: np.interp(x, [0.6, 0.8], [0, 1]) * np.cos(np.pi / 2 * np.interp(x, [0.8, 1], [0, 1])) ** 2,
        ),
    ],
    ids=["linear", "linear between markers", "cosine", "cubic", "exponential", "steps", "in turn", "nested"],
)
def test_values_match_formula(schedule, reference):
    np.testing.assert_allclose([schedule(x) for x in GRID], reference(GRID), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Linear, Cosine, Cubic, Exponential])
def test_values_are_exact_at_ends_and_constant_outside(kind):
    schedule = kind(0.3, 0.7, begin=0.2, until=0.6)
    assert [schedule(x) for x in (0.0, 0.19, 0.2)] == pytest.approx([0.3] * 3, abs=0)
    assert [schedule(x) for x in (0.6, 0.8, 1.0)] == [0.7] * 3


def test_ramp_of_length_zero_jumps():
    jump = Linear(0.0, 1.0, begin=0.5, until=0.5)
    assert [jump(x) for x in (0.49, 0.5)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("number", "batches"), [(0, 0), (4, 4), (10, 10), (12, 14), (15, 20), (16, 24), (18, 30), (20, 38), (21, 40)]
)
def test_plan_places_steps_under_varying_accumulation(number, batches):
    # 10 batches per epoch: a step per batch, then per two batches, then per four (so 4, 4 and 2)
    plan = Plan(max_epochs=10, per_epoch=10, per_step={0: 1, 1: 2, 2: 4})
    assert plan.point(f"{number}st") == (batches, batches / 10, number)
    assert plan.point(f"{batches / 10}ep").steps == number


@pytest.mark.parametrize(("marker", "batches"), [("3ep", 30.0), ("1.5ep", 15.0), ("4st", 14.0), ("6st", 20.0)])
def test_plan_converts_markers_to_batches(marker, batches):
    # 10 batches per epoch and 4 per step: an epoch has steps of 4, 4 and 2 batches
    assert Plan(max_epochs=10, per_epoch=10, per_step={0: 4}).point(marker).batches == batches


def test_marker_takes_effect_at_its_batch():
    clock = Clock(Plan(max_epochs=10, per_epoch=7))
    schedule = Steps([0.0, 1.0], at=["3ep"])
    assert [schedule.at_moment(clock.moment(Point(batch, batch / 7, batch))) for batch in (20, 21)] == [0.0, 1.0]


def test_epoch_markers_work_in_endless_run():
    clock = Clock(Plan(per_epoch=10))
    schedule = Linear(0.0, 1.0, until="2ep")
    values = [schedule.at_moment(clock.moment(Point(batch, batch / 10, batch))) for batch in (0, 10, 20, 500)]
    assert values == [0.0, 0.5, 1.0, 1.0]


def test_schedule_sets_strength_in_fit():
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([RecordedPenalty(Linear(0.0, 8.0), inject="gradient")], max_epochs=2)
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_schedule_sets_strength_on_loss_route():
    seen = []

    class RecordedPenalty(L1Penalty):
        def value(self, params):
            seen.append(self.current["strength"])
            return super().value(params)

    fit([RecordedPenalty(Linear(0.0, 8.0), inject="loss")], max_epochs=2)
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]  # strength 0 needs no value


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 2}])
def test_progress_under_accumulation(limit):
    """The value in a step depends on the batches before the step, not on those that it accumulates."""
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit(
        [RecordedPenalty(Linear(0.0, 1.0), inject="gradient")],
        data=loader(64, batch_size=16),
        accumulate_grad_batches=4,
        **limit,
    )
    assert seen == [0.0, 0.5]


def test_step_markers_count_optimizer_steps():
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([RecordedPenalty(Steps([1.0, 2.0], at=["1st"]), inject="gradient")], accumulate_grad_batches=2, max_epochs=2)
    assert seen == [1.0, 2.0, 2.0, 2.0]


def test_function_as_schedule():
    seen = []

    class RecordedPenalty(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    fit([RecordedPenalty(lambda progress: 2 * progress, inject="gradient")], max_epochs=1)
    assert seen == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 1, until="3epochs"), r"Linear: until: expected .*'3ep'.*'500st', got '3epochs'"),
        (lambda: Linear(0, 1, until=1.5), r"Linear: until, as a fraction of training, must be a number in \[0, 1\], got 1.5"),
        (lambda: Linear(0, 1, begin=0.5, until=0.25), "Linear: the markers must not decrease, got 0.5 before 0.25"),
        (lambda: Steps([1, 0], at=["5ep", "3ep"]), "one more value than markers, got 2 values and 2 markers"),
        (lambda: Steps([1, 0, 1], at=["5ep", "3ep"]), "the markers must not decrease, got 5ep before 3ep"),
        (lambda: SequentialSchedule([0, 1], at=[]), "one more schedule than markers, got 2 schedules and 0 markers"),
        (
            lambda: SequentialSchedule([0, 1, 0], at=[0.5, 0.2]),
            "SequentialSchedule: the markers must not decrease, got 0.5 before",
        ),
        (lambda: SequentialSchedule([0, 1], at=["3 ep"]), "SequentialSchedule: each marker: expected .*'3ep'.*got '3 ep'"),
        (
            lambda: SequentialSchedule([0, Linear(0, 1, until="9st")], at=["5ep"]),
            r"Linear\(0.0, 1.0, until='9st'\) acts from '5ep' to 1.0, but its marker '9st' counts from '5ep', which has "
            "a different unit: use fractions of the stretch, or the unit of '5ep'",
        ),
        (
            lambda: SequentialSchedule([0, Linear(0, 1, begin=0.5, until="9ep")], at=["5ep"]),
            "acts from '5ep' to 1.0, where fractions cannot be compared with its other markers: use only one of the two",
        ),
        (
            lambda: SequentialSchedule([Linear(0, 1, until="8ep"), 0], at=["5ep"]),
            "SequentialSchedule: the markers must not decrease, got 8ep before 5ep",
        ),
        (lambda: SequentialSchedule([0, float("inf")], at=[0.5]), "schedule 1, unless it is .* got inf"),
        (lambda: Exponential(1.0, 0.0), r"Exponential: end must be a number in \(0, inf\], got 0.0"),
        (lambda: Linear(0, float("nan")), r"Linear: end must be a number .* got nan"),
    ],
    ids=[
        "unknown unit",
        "fraction above 1",
        "markers decrease",
        "too few values",
        "epochs decrease",
        "too many parts",
        "parts decrease",
        "malformed part",
        "other unit",
        "not comparable",
        "outside its stretch",
        "infinite part",
        "end of 0",
        "end of NaN",
    ],
)
def test_malformed_schedules_raise_immediately(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_decreasing_markers_raise_when_fit_starts():
    with pytest.raises(
        ValueError,
        match=r"Linear\(0.0, 1.0, begin='2ep', until=0.25\): the markers must not decrease, but 0.25 comes before '2ep'",
    ):
        fit([L1Penalty(Linear(0, 1, begin="2ep", until=0.25))], max_epochs=4)


def test_schedule_out_of_range_raises():
    with pytest.raises(ValueError, match=r"L1Penalty: strength=Linear\(1.0, -1.0\) must be a number in \[0, inf\), got -1.0"):
        L1Penalty(Linear(1.0, -1.0))
    with pytest.raises(ValueError, match=r"L1Penalty: strength=.* at progress 0.5 must be a number in \[0, inf\), got -0.5"):
        fit([L1Penalty(lambda progress: -progress)], max_epochs=1, limit_train_batches=2)


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(0.0, 1.0),
        Steps([0, 1], at=[0.5]),
        lambda progress: progress,
        SequentialSchedule([0, Linear(0, 1)], at=["2ep"]),
        SequentialSchedule([0, lambda progress: progress], at=["2ep"]),
        SequentialSchedule([0, 1], at=[0.5]),
    ],
    ids=["linear", "steps", "callable", "last part", "last callable", "at a fraction"],
)
def test_fraction_in_endless_run_raises(schedule):
    with pytest.raises(ValueError, match=r"L1Penalty: strength=.* the run has no end \(max_epochs=-1\).*'3ep' or '500st'"):
        fit([L1Penalty(schedule)], max_epochs=-1)


def test_markers_in_epochs_and_steps_need_a_fit():
    with pytest.raises(RuntimeError, match="the position of the marker '3ep' is unknown until a fit starts"):
        Linear(0.0, 1.0, until="3ep")(0.5)


@pytest.mark.parametrize("wrong", ["Linear", None, Linear, [0.0]], ids=str)
def test_a_part_that_is_no_schedule_raises(wrong):
    with pytest.raises(
        TypeError, match="SequentialSchedule: schedule 1, unless it is a schedule or a function, must be a number"
    ):
        SequentialSchedule([0.0, wrong], at=[0.5])


@pytest.mark.parametrize("kind", [Steps, SequentialSchedule])
@pytest.mark.parametrize("wrong", [0.5, "3ep", Linear(0.0, 1.0)], ids=str)
def test_arguments_that_are_no_lists_raise(kind, wrong):
    with pytest.raises(TypeError, match=f"^{kind.__name__}: (values|schedules) must be a list, got "):
        kind(wrong, at=[0.5])
    with pytest.raises(TypeError, match=f"^{kind.__name__}: at must be a list, got "):
        kind([0.0, 1.0], at=wrong)


def test_extremes_of_parts_are_checked():
    with pytest.raises(ValueError, match=r"L1Penalty: strength=SequentialSchedule.* must be a number in \[0, inf\), got -1.0"):
        L1Penalty(SequentialSchedule([Linear(0.0, 1.0), Linear(1.0, -1.0)], at=["3ep"]))


def test_endless_run_with_parts_in_epochs():
    """A fraction of a stretch that has an end is no fraction of training."""
    clock = Clock(Plan(per_epoch=4))
    parts = [Linear(0.0, 4.0), Linear(4.0, 0.0, until=0.5), Linear(0.0, 8.0, until="2ep")]
    schedule = SequentialSchedule(parts, at=["1ep", "2ep"])
    assert not schedule.needs_end
    values = [schedule.at_moment(clock.advance(Point(batch, batch / 4, batch))) for batch in range(18)]
    assert values == [0.0, 1.0, 2.0, 3.0, 4.0, 2.0, 0.0, 0.0, *map(float, range(9)), 8.0]
    fit([L1Penalty(schedule)], max_epochs=-1, max_steps=20)


def test_parts_see_what_is_done_in_their_stretch():
    moment = Clock(Plan(max_epochs=8, per_epoch=10)).advance(Point(50, 5.0, 50))
    assert (moment.within("3ep", "7ep").epochs, moment.within(0.0, "10ep").epochs) == (2.0, 5.0)
    assert (moment.within("20st", 1.0).steps, moment.within("20st", 1.0).progress) == (30.0, 0.5)
    assert math.isnan(moment.within("20st", 1.0).epochs)
    with pytest.raises(RuntimeError, match="the position of the marker '3ep' is unknown until a fit starts"):
        SequentialSchedule([0, 1], at=["3ep"])(0.5)
