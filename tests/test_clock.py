"""The clock of a fit against a simulation, for random fits and in real ones."""

from __future__ import annotations

import itertools
import pickle
import random
import warnings

import pytest
from helpers import QUIET, Classifier, Gan, digits, fit, loader
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.tuner import Tuner
from simulation import FAR, Run, passed, simulate, valid
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_reg import Cosine, Cubic, L1Penalty, Linear, SequentialSchedule, Steps, WeightPruning, sparsity
from lightning_reg._engine import clock as clock_module
from lightning_reg._engine.clock import Clock, Line


def random_run(rng):
    """Return a random fit."""
    changes = rng.random() < 0.4
    length = rng.randint(1, 9)
    lengths = [rng.randint(1, 9) if changes else length for _ in range(FAR)]
    windows = rng.choice([[1], [2], [3], [4], [3, 1, 4]])
    accumulation = [windows[min(epoch, len(windows) - 1)] for epoch in range(FAR)]
    stepping = rng.choice([[], [], [1], [2], [3], [0, 0, 0, 1], [0, 2, 1]])
    max_epochs = rng.choice([None, rng.randint(1, 6)])
    max_steps = rng.choice([None, None, rng.randint(1, 20)])
    return Run(lengths, accumulation, stepping, rng.random() < 0.7, max_epochs, max_steps)


def random_markers(rng, run):
    """Return pairs of markers in all units, as far as the run knows them."""
    whole = [f"{rng.randint(0, 4)}ep", f"{rng.randint(0, 12)}st"]
    begins = [0.0, *whole] if run.endless else [0.0, rng.uniform(0, 0.6), *whole]
    untils = [f"{rng.choice([1, 2, 2.5, 4])}ep", f"{rng.randint(1, 15)}st"]
    return list(itertools.product(begins, untils if run.endless else [*untils, 1.0, rng.uniform(0.4, 1)]))


def follow(run, pairs, *, schedules=None, resume_at=None, as_run=None):
    """Yield the same as ``simulate``, from the clock; resume at a moment from a state that was pickled."""
    clock = epoch = first = None
    schedules = schedules or {pair: Linear(0.0, 1.0, begin=pair[0], until=pair[1]) for pair in pairs}
    for i, now in enumerate(run.moments()):
        first = now if epoch != now.epoch else first
        plan = run.plan(first)
        if clock is None:
            clock = Clock(plan)
        elif i == resume_at:
            run, plan = as_run or run, (as_run or run).plan(first)
            state = pickle.loads(pickle.dumps(clock.state_dict()))
            clock = Clock(plan)
            clock.load_state_dict(state)
            clock.begin_epoch(plan, run.point(now))
        if epoch != now.epoch:
            clock.begin_epoch(plan, run.point(now))
        epoch = now.epoch
        moment = clock.advance(run.point(now))
        yield now, moment.progress, {pair: schedule.at_moment(moment) for pair, schedule in schedules.items()}


def cases(numbers):
    """Yield random fits with pairs of markers."""
    for number in numbers:
        rng = random.Random(number)
        run = random_run(rng)
        yield run, [pair for pair in random_markers(rng, run) if valid(pair)]


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_clock_agrees_with_simulation(start):
    for run, pairs in cases(range(start, start + 100)):
        for expected, found in itertools.zip_longest(simulate(run, pairs), follow(run, pairs)):
            now, progress, positions = expected
            assert found[1] == pytest.approx(progress, abs=1e-9), (run, now)
            if positions:
                assert found[2] == pytest.approx(positions, abs=1e-7), (run, now)


def test_simulation_covers_every_kind_of_run():
    runs = [run for run, _ in cases(range(400))]
    kinds = {(run.sized, bool(run.stepping), run.max_epochs is None, run.max_steps is None) for run in runs}
    assert len(kinds) == 16
    assert {len(set(run.lengths)) > 1 for run in runs if run.exact and run.accumulation[0] > 1} == {True, False}


def test_a_wrong_clock_is_caught(monkeypatch):
    """Each comparison can fail."""
    for name, wrong in (
        ("fraction_done", lambda point, length: min(point.epochs / 5, 1.0)),
        ("line_in_unit", lambda begin, until, now: Line(0.0, 0.0, float(str(until).rstrip("epst")))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(clock_module, name, wrong)
            with pytest.raises(AssertionError):
                test_clock_agrees_with_simulation(0)


def test_markers_act_at_their_moments():
    for run, _ in cases(range(200)):
        units = [1.0, 0.37] if not run.endless else []
        schedules = {marker: Steps([0.0, 1.0], at=[marker]) for marker in ("1ep", "2.5ep", "1st", "4st", "7st", *units)}
        for now, progress, values in follow(run, [], schedules=schedules):
            assert values == {marker: float(passed(run, marker, now, progress)) for marker in schedules}, (run, now)


IN_TURN = [
    (
        SequentialSchedule(
            [Linear(0, 1), Linear(1, 2, begin="0.5ep", until="1ep"), Linear(2, 3, until="1.5ep")], at=["1ep", "2ep"]
        ),
        [Linear(0, 1, until="1ep"), Linear(1, 2, begin="1.5ep", until="2ep"), Linear(2, 3, begin="2ep", until="3.5ep")],
        ["1ep", "2ep"],
    ),
    (
        SequentialSchedule([Linear(0, 1, begin=0.5), Linear(1, 0, until="4st")], at=["3st"]),
        [Linear(0, 1, begin="1.5st", until="3st"), Linear(1, 0, begin="3st", until="7st")],
        ["3st"],
    ),
    (
        SequentialSchedule([Linear(0, 1), SequentialSchedule([Linear(1, 2), Cosine(2, 3)], at=["1ep"])], at=["1ep"]),
        [Linear(0, 1, until="1ep"), Linear(1, 2, begin="1ep", until="2ep"), Cosine(2, 3, begin="2ep")],
        ["1ep", "2ep"],
    ),
    (
        SequentialSchedule([Linear(0, 1), Linear(1, 2, begin=0.5)], at=[0.5]),
        [Linear(0, 1, until=0.5), Linear(1, 2, begin=0.75)],
        [0.5],
    ),
]
"""Schedules in turn, with their parts as schedules of the whole fit, and the markers between them."""


def test_schedules_in_turn_equal_their_parts_also_when_resumed():
    """The value of the whole is that of the last part whose stretch has begun."""
    for run, _ in cases(range(150)):
        for whole, parts, starts in IN_TURN:
            if run.endless and not all(isinstance(part.until, str) for part in parts):
                continue
            schedules = {"whole": whole, **dict(enumerate(parts))}
            seen = list(follow(run, [], schedules=schedules))
            for now, progress, values in seen:
                begun = sum(passed(run, start, now, progress) for start in starts)
                assert values["whole"] == values[begun], (run, now, whole)
            for i in range(1, len(seen), 3):
                assert list(follow(run, [], schedules=schedules, resume_at=i)) == seen, (run, i)


def test_progress_and_ramps_rise_steadily():
    for run, pairs in cases(range(400)):
        seen = list(follow(run, pairs))
        values = [{"progress": progress, **positions} for _, progress, positions in seen]
        assert values[0]["progress"] == 0.0
        assert run.endless or values[-1]["progress"] == 1.0, run
        for before, after in itertools.pairwise(values):
            assert all(after[key] >= before[key] for key in after), run


def test_resumed_clock_equals_uninterrupted_one_to_the_last_bit():
    for run, pairs in cases(range(200)):
        whole = list(follow(run, pairs))
        for i in range(1, len(whole)):
            assert list(follow(run, pairs, resume_at=i)) == whole, (run, i)


@pytest.mark.parametrize("stepping", [[], [2]], ids=["automatic", "manual"])
@pytest.mark.parametrize("sized", [(True, True), (False, False), (True, False), (False, True)], ids=str)
def test_resume_with_other_limits_goes_on_from_where_it_was(sized, stepping):
    limits = [(4, None), (9, None), (6, 20), (None, 17), (None, None)]
    pairs = [(0.0, "5ep"), ("1ep", "20st"), ("2st", "3ep"), ("3st", "12st")]
    for first, second, stop in itertools.product(limits, limits, range(4, 20)):
        run = Run([4] * FAR, [1] * FAR, stepping, sized[0], *first)
        moments = list(itertools.islice(run.moments(), stop))
        if len(moments) < stop:
            continue
        *_, (now, progress, before) = itertools.islice(follow(run, pairs), stop)
        if now.batch and sized[0] != sized[1]:  # epochs have lost or got their fractions
            continue
        resumed = Run(run.lengths, run.accumulation, stepping, sized[1], *second)
        goes_on = follow(run, pairs, resume_at=stop - 1, as_run=resumed)
        *_, (_, progress_after, after) = itertools.islice(goes_on, stop)
        assert after == pytest.approx(before), (first, second, now)
        is_over = now.epoch >= (resumed.max_epochs or FAR) or now.steps >= (resumed.max_steps or FAR)
        if not run.endless and not resumed.endless and not is_over:
            assert progress_after == pytest.approx(progress), (first, second, now)


def test_ramp_beyond_the_end_rises_as_if_the_run_were_longer():
    run = Run([4] * FAR, [1] * FAR, [], sized=True, max_epochs=3, max_steps=None)
    *_, (_, _, values) = follow(run, [(0.0, "6ep"), (0.0, "24st")])
    assert list(values.values()) == [0.5, 0.5]


def test_clock_survives_much_shorter_epochs_before():
    """Markers that lie behind have no place in a plan of long epochs."""
    run = Run([1, 1, 50, 50], [1] * 4, [], sized=True, max_epochs=4, max_steps=None)
    *_, (_, _, values) = follow(run, [("1ep", "2ep"), ("1st", "3ep"), ("1ep", 1.0)])
    assert list(values.values()) == [1.0, 1.0, 1.0]


# Real fits ----------------------------------------------------------------------------------------------------------


class Stepping(Classifier):
    """Takes a number of steps in each batch, over and over: ``stepping[0]`` in the first, and so on."""

    def __init__(self, stepping):
        super().__init__(lr=0.01)
        self.automatic_optimization = False
        self.stepping = stepping

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss, retain_graph=True)
        for _ in range(self.stepping[self.trainer.fit_loop.total_batch_idx % len(self.stepping)]):
            self.optimizers().step()


class Growing(LightningDataModule):
    """Has more batches in later epochs."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def train_dataloader(self):
        return loader(16 * self.lengths[self.trainer.current_epoch])


MARKERS = [(0.0, 1.0), (0.25, "2ep"), ("1ep", "9st"), ("2st", 0.8), (0.0, "8st"), ("1ep", "2ep")]


def observed(pairs, model=None, data=None, *callbacks, ckpt_path=None, **trainer):
    """Return the values of ramps at each optimizer step of a real fit."""
    seen = {pair: [] for pair in pairs}

    class Recorded(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen[self.pair].append(self.current["strength"])

    def recorded(number, pair):
        penalty = Recorded(Linear(0.0, 1.0, begin=pair[0], until=pair[1]), inject="gradient", name=f"penalty {number}")
        penalty.pair = pair
        return penalty

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not reach it|not resumable)")
        ours = [recorded(*pair) for pair in enumerate(pairs)]
        fitted = Trainer(**{**QUIET, **trainer}, callbacks=[*callbacks, *ours])
        fitted.fit(model or Classifier(), loader() if data is None else data, ckpt_path=ckpt_path)
    return seen


def expected(run, pairs):
    """Return the same from the simulation."""
    *before, end = simulate(run, pairs)
    at_step = {now.steps: positions for now, _, positions in before if now.steps < end[0].steps}
    return {pair: [positions[pair] for positions in at_step.values()] for pair in pairs}


def unsized(batches):
    return DataLoader(Unsized(16 * batches), batch_size=16)


class Unsized(IterableDataset):
    """A dataset of digits without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(zip(*digits(self.samples), strict=True))


def run_of(batches, accumulation=1, stepping=(), sized=True, max_epochs=None, max_steps=None):
    lengths = batches if isinstance(batches, list) else [batches]
    windows = accumulation if isinstance(accumulation, list) else [accumulation]
    return Run(lengths + lengths[-1:] * FAR, windows + windows[-1:] * FAR, list(stepping), sized, max_epochs, max_steps)


FITS = {
    "accumulation": (run_of(10, 4, max_epochs=3), lambda: {"data": loader(160), "accumulate_grad_batches": 4}),
    "accumulation until a step": (
        run_of(10, 4, max_steps=5),
        lambda: {"data": loader(160), "accumulate_grad_batches": 4, "max_epochs": -1, "max_steps": 5},
    ),
    "varying accumulation": (
        run_of(7, [1, 2, 4], max_epochs=3),
        lambda: {"data": loader(112), "callbacks": [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]},
    ),
    "two optimizers": (run_of(4, stepping=[2], max_epochs=3), lambda: {"model": Gan()}),
    "three steps in a batch": (run_of(4, stepping=[3], max_epochs=3), lambda: {"model": Stepping([3])}),
    "a step every four batches": (
        run_of(6, stepping=[0, 0, 0, 1], max_epochs=3),
        lambda: {"model": Stepping([0, 0, 0, 1]), "data": loader(96)},
    ),
    "manual until a step": (
        run_of(4, stepping=[3], max_steps=9),
        lambda: {"model": Stepping([3]), "max_epochs": -1, "max_steps": 9},
    ),
    "manual, unsized": (
        run_of(4, stepping=[3], sized=False, max_epochs=3),
        lambda: {"model": Stepping([3]), "data": unsized(4)},
    ),
    "unsized": (run_of(4, sized=False, max_epochs=3), lambda: {"data": unsized(4)}),
    "unsized until a step": (
        run_of(4, sized=False, max_steps=9),
        lambda: {"data": unsized(4), "max_epochs": -1, "max_steps": 9},
    ),
    "unsized with accumulation": (
        run_of(5, 2, sized=False, max_epochs=3),
        lambda: {"data": unsized(5), "accumulate_grad_batches": 2},
    ),
    "growing epochs": (
        run_of([2, 5, 3], max_epochs=3),
        lambda: {"data": Growing([2, 5, 3]), "reload_dataloaders_every_n_epochs": 1},
    ),
    "a fraction of the batches": (run_of(5, max_epochs=3), lambda: {"data": loader(160), "limit_train_batches": 0.5}),
    "frequent validation": (
        run_of(10, 4, max_epochs=3),
        lambda: {
            "model": Validated(),
            "data": loader(160),
            "accumulate_grad_batches": 4,
            "val_check_interval": 3,
        },
    ),
    "max_time": (run_of(4, max_epochs=3), lambda: {"max_time": "00:01:00:00"}),
    "fast_dev_run": (run_of(1, max_epochs=1, max_steps=1), lambda: {"fast_dev_run": True}),
}


class Validated(Classifier):
    """Validates on two batches."""

    def val_dataloader(self):
        return loader(32)

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("name", FITS)
def test_real_fit_agrees_with_simulation(name):
    run, make = FITS[name]
    options = {"max_epochs": 3, "model": None, "data": None, "callbacks": [], **make()}
    seen = observed(MARKERS, options.pop("model"), options.pop("data"), *options.pop("callbacks"), **options)
    wanted = expected(run, MARKERS)
    assert len(wanted[MARKERS[0]]) > 0
    for pair in MARKERS:
        assert seen[pair] == pytest.approx(wanted[pair]), pair


def test_max_steps_in_manual_optimization_counts_steps():
    seen = observed([(0.0, 1.0)], Stepping([1]), max_epochs=-1, max_steps=8)
    assert seen[0.0, 1.0] == [i / 8 for i in range(8)]


def test_step_marker_acts_at_its_step_in_manual_optimization():
    for stepping in ([3], [0, 0, 0, 1]):
        seen = []

        class Recorded(L1Penalty):
            def gradients(self, params, optimizer, step, seen=seen):
                seen.append(self.current["strength"])

        fit([Recorded(Steps([0.0, 1.0], at=["4st"]))], Stepping(stepping), max_epochs=6)
        assert seen == [0.0] * 4 + [1.0] * (len(seen) - 4)
        assert len(seen) == 24 * sum(stepping) / len(stepping)


def test_trial_fit_accepts_schedules_of_the_real_one():
    schedules = Linear(0.0, 1.0, begin="2st", until=0.8), Cubic(0.0, 0.8, until="3ep")
    fit([L1Penalty(schedules[0]), WeightPruning(schedules[1])], fast_dev_run=True)


def test_pruning_by_steps_in_manual_optimization_needs_no_plan():
    model = fit([WeightPruning(Cubic(0.0, 0.5, until="16st"))], Gan(), max_epochs=2)
    assert sparsity(model).fraction == 0.5


# Resumed and repeated fits ------------------------------------------------------------------------------------------


class Resumable(DataLoader):
    """Goes on after the batches that it has given."""

    def __init__(self, batches):
        super().__init__(TensorDataset(*digits(16 * batches)), batch_size=16)
        self.given = self.skipped = 0

    def __iter__(self):
        batches = itertools.islice(super().__iter__(), self.skipped, None)
        self.given, self.skipped = self.skipped, 0
        for batch in batches:
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given % len(self)}

    def load_state_dict(self, state):
        self.skipped = state["given"]


class Saves(Callback):
    """Saves a checkpoint and stops after a batch."""

    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


class SavesEpoch(Callback):
    """Saves a checkpoint after an epoch."""

    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, *args):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batches", [1, 2, 4, 5, 6, 9, 10, 12])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fit_resumed_in_mid_epoch_goes_on(tmp_path, batches, accumulation):
    if batches % 5 % accumulation:
        return  # Lightning does not save gradients
    options = {"max_epochs": 3, "accumulate_grad_batches": accumulation}
    whole = observed(MARKERS, None, Resumable(5), **options)
    with pytest.raises(SystemExit):
        observed(MARKERS, None, Resumable(5), Saves(batches, tmp_path / "a.ckpt"), **options)
    rest = observed(MARKERS, None, Resumable(5), **options, ckpt_path=tmp_path / "a.ckpt")
    assert rest == {pair: values[len(values) - len(rest[pair]) :] for pair, values in whole.items()}
    assert len(rest[MARKERS[0]]) < len(whole[MARKERS[0]])


def resume_after_first_epoch(path, pairs, first, second, **limits):
    observed(pairs, None, loader(16 * first), SavesEpoch(0, path), **limits)
    return observed(pairs, None, loader(16 * second), **limits, ckpt_path=path)


def test_resume_with_other_batch_size_goes_on(tmp_path):
    """Epochs of 4 batches, from the second on of 8."""
    seen = resume_after_first_epoch(tmp_path / "a.ckpt", MARKERS, 4, 8, max_epochs=3)
    wanted = expected(run_of([4, 8], max_epochs=3), MARKERS)
    for pair in MARKERS:
        assert seen[pair] == pytest.approx(wanted[pair][4:]), pair
    assert seen[0.0, 1.0] == pytest.approx([(4 + i / 2) / 12 for i in range(16)])


def test_resume_with_more_epochs_ends_at_the_new_end(tmp_path):
    pairs = [(0.0, 1.0), (0.0, "4ep"), ("1ep", "12st")]
    observed(pairs, None, loader(), SavesEpoch(0, tmp_path / "a.ckpt"), max_epochs=2)
    seen = observed(pairs, None, loader(), max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert seen[pairs[0]] == pytest.approx([0.5 + i / 32 for i in range(16)])
    assert seen[pairs[1]] == pytest.approx([min(i / 16, 1.0) for i in range(4, 20)])
    assert seen[pairs[2]] == pytest.approx([min(i / 8, 1.0) for i in range(16)])


def test_finished_fit_resumed_with_more_epochs_stays_at_the_end(tmp_path):
    """Its progress was 1, and what is done stays done; markers in epochs and steps go on."""
    pairs = [(0.0, 1.0), (0.25, "4ep"), ("1ep", "12st")]
    before = observed(pairs, None, loader(), SavesEpoch(1, tmp_path / "a.ckpt"), max_epochs=2)
    seen = observed(pairs, None, loader(), max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert seen[pairs[0]] == [1.0] * 12
    assert before[pairs[1]] + seen[pairs[1]] == pytest.approx([0, 0, *(i / 14 for i in range(14)), 1, 1, 1, 1])
    assert before[pairs[2]] + seen[pairs[2]] == pytest.approx([0] * 4 + [i / 8 for i in range(8)] + [1] * 8)


def test_second_fit_over_longer_epochs_does_not_ask_for_the_order_of_what_is_over():
    """If all epochs had been as long as they are now, the third would have ended before step 10."""
    trainer = Trainer(**QUIET, max_epochs=4, callbacks=[L1Penalty(Linear(0.0, 1.0, begin="10st", until="3ep"))])
    trainer.fit(model := Classifier(), loader())
    trainer.fit_loop.max_epochs = 6
    trainer.fit(model, loader(128))
    assert trainer.callbacks[0].current["strength"] == 1.0


def test_second_fit_with_more_epochs():
    seen = []

    class Recorded(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[Recorded(Linear(0.0, 1.0), inject="gradient")])
    model = Classifier()
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader())
    assert seen == [i / 8 for i in range(8)] + [i / 16 for i in range(8, 16)]


@pytest.mark.parametrize("find", ["lr_find", "scale_batch_size"])
def test_finders_before_a_fit_leave_time_alone(find, tmp_path):
    seen = []

    class Recorded(L1Penalty):
        def gradients(self, params, optimizer, step):
            seen.append(self.current["strength"])

    class Sized(Classifier):
        batch_size = 16

        def train_dataloader(self):
            return loader(64, self.batch_size)

    trainer = Trainer(
        **QUIET, max_epochs=2, default_root_dir=tmp_path, callbacks=[Recorded(Linear(0.0, 1.0), inject="gradient")]
    )
    options = {"num_training": 5} if find == "lr_find" else {"max_trials": 1, "init_val": 16}
    getattr(Tuner(trainer), find)(model := Sized(), **options)
    model.batch_size = 16
    trainer.fit(model)
    assert seen == [i / 8 for i in range(8)]


# Markers beyond the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "options", "marker", "end"),
    [
        (Steps([0.0, 0.4], at=["50ep"]), {}, "50ep", "3 epochs"),
        (Cubic(0.0, 0.8, until="30ep"), {}, "30ep", "3 epochs"),
        (Linear(0.0, 0.1, until="500st"), {}, "500st", "12 optimizer steps"),
        (Linear(0.0, 0.1, until="12st"), {"accumulate_grad_batches": 2}, "12st", "6 optimizer steps"),
        (Linear(0.0, 0.1, until="3ep"), {"max_epochs": -1, "max_steps": 6}, "3ep", "1.5 epochs"),
        (Linear(0.0, 0.1, until="9st"), {"max_epochs": -1, "max_steps": 8, "model": Stepping([1])}, "9st", "8 optimizer steps"),
        (Linear(0.0, 0.1, until="4ep"), {"model": Stepping([2])}, "4ep", "3 epochs"),
        (Linear(0.0, 0.1, until="4ep"), {"data": unsized(4)}, "4ep", "3 epochs"),
        (Linear(0.0, 0.1, until="1st"), {"max_epochs": 1, "limit_train_batches": 1}, None, None),
        (Linear(0.0, 0.1, until="3ep"), {}, None, None),
        (Linear(0.0, 0.1, until="12st"), {}, None, None),
        (Steps([0.0, 0.1, 0.2], at=["1ep", "2ep"]), {}, None, None),
        (Linear(0.0, 0.1, until="40st"), {"model": Stepping([3])}, None, None),  # nobody knows
        (Linear(0.0, 0.1, until="500st"), {"data": unsized(4)}, None, None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_marker_beyond_the_end_is_a_warning_that_names_both(schedule, options, marker, end):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            [L1Penalty(schedule)],
            options.get("model"),
            **{"max_epochs": 3, **{k: v for k, v in options.items() if k != "model"}},
        )
    messages = [str(warning.message) for warning in caught if "does not reach" in str(warning.message)]
    assert len(messages) == (marker is not None)
    if marker:
        assert f"has the marker '{marker}', but the run ends after {end}, so" in messages[0]


def test_last_line_of_pruning_names_the_true_goal():
    pruning = WeightPruning(Cubic(0.0, 0.8, until="30ep"))
    with pytest.warns(UserWarning, match="'30ep', but the run ends after 3 epochs"):
        model = fit([pruning], max_epochs=3)
    reached = sparsity(model).fraction
    assert reached == pytest.approx(0.8 - 0.8 * 0.9**3, abs=1e-3)
    assert f"{reached:.2%}" in pruning.fit_summary()
    assert "80.00%" in pruning.fit_summary()
