"""Calls of LightningCLI through the example script: flags, YAML, and the printed configuration."""

from __future__ import annotations

import inspect

import digits
import docstring_parser
import pytest
import yaml
from helpers import QUIET, Classifier, loader, same, vars_of
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from processes import ROOT, run_script
from table import ROWS, everything

import lightning_reg
from lightning_reg import Cosine, DropoutInjection, DropoutScheduler, L1Penalty, Linear
from lightning_reg.schedules import Schedule

SHORT = [
    "fit",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--data.train_samples=80",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter is intended")


def run(*args):
    """Run the CLI and return it."""
    return LightningCLI(
        digits.DigitsClassifier, digits.Digits, args=[*SHORT, *args], seed_everything_default=0, save_config_callback=None
    )


def regularizers(cli):
    return [cb for cb in cli.trainer.callbacks if type(cb).__module__.startswith("lightning_reg")]


FLAGS = [
    "--trainer.callbacks+=L1Penalty",
    "--trainer.callbacks.strength=1e-4",
    '--trainer.callbacks.params=["weights", "!net.5.*"]',
    "--trainer.callbacks+=DropoutInjection",
    "--trainer.callbacks.p=Cosine",
    "--trainer.callbacks.p.start=0.5",
    "--trainer.callbacks.p.end=0",
    "--trainer.callbacks.p.until=1ep",
    '--trainer.callbacks.after=["ReLU"]',
]


def test_flags():
    by_flags = run(*FLAGS)
    expected = [
        L1Penalty(1e-4, params=["weights", "!net.5.*"]),
        DropoutInjection(Cosine(0.5, 0.0, until="1ep"), after=["ReLU"]),
    ]
    assert list(map(repr, regularizers(by_flags))) == list(map(repr, expected))
    seed_everything(0, verbose=False)
    model = digits.DigitsClassifier()
    Trainer(**{**QUIET, "max_epochs": 2}, callbacks=expected).fit(model, digits.Digits(train_samples=80))
    assert same(by_flags.model, model)


def test_printed_config_reproduces_run(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(*FLAGS, "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert same(run(*FLAGS).model, run("--config", str(tmp_path / "printed.yaml")).model)
    assert not same(run(*FLAGS).model, run().model)


def test_depth_profile_in_yaml(tmp_path):
    profile = {"net.2": 0.3, "net.4": {"class_path": "lightning_reg.Linear", "init_args": {"start": 0.0, "end": 0.5}}}
    callbacks = [
        {"class_path": "lightning_reg.DropoutInjection", "init_args": {"p": 0.1, "after": ["ReLU"]}},
        {"class_path": "lightning_reg.DropoutScheduler", "init_args": {"p": profile}},
    ]
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    cli = run("--config", str(tmp_path / "profile.yaml"))
    expected = [DropoutInjection(0.1, after=["ReLU"]), DropoutScheduler({"net.2": 0.3, "net.4": Linear(0.0, 0.5)})]
    assert list(map(repr, regularizers(cli))) == list(map(repr, expected))
    flags = ["--trainer.callbacks+=DropoutInjection", "--trainer.callbacks.p=0.1", "--trainer.callbacks.after=ReLU"]
    by_flags = run(*flags, "--trainer.callbacks+=DropoutScheduler", '--trainer.callbacks.p={"net.2": 0.3, "net.4": 0.2}')
    assert regularizers(by_flags)[1].p == {"net.2": 0.3, "net.4": 0.2}
    assert not same(by_flags.model, cli.model)


def test_yaml():
    cli = run("--config", str(ROOT / "examples" / "digits.yaml"), "--trainer.max_epochs=1")
    expected = digits.candidates()[digits.ALL]
    expected[1] = lightning_reg.L2Penalty(Linear(0.0, 1e-2, until=0.5))
    assert list(map(repr, regularizers(cli))) == list(map(repr, expected))


@pytest.mark.parametrize("name", ROWS)
def test_help_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit):
        run(f"--trainer.callbacks.help={name}")
    printed = " ".join(capsys.readouterr().out.split())
    documented = docstring_parser.parse(getattr(lightning_reg, name).__doc__).params
    arguments = inspect.signature(getattr(lightning_reg, name)).parameters
    assert [argument.arg_name for argument in documented] == list(arguments)
    for argument in documented:
        assert f"--trainer.callbacks.{argument.arg_name}" in printed
        assert " ".join(argument.description.split()) in printed


def test_bad_values_raise(capsys):
    with pytest.raises(SystemExit):
        run("--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=strong")
    assert "strength" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"L1Penalty: strength must be a number in \[0, inf\), got -1.0"):
        run("--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=-1")


@pytest.mark.slow
def test_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SHORT, *FLAGS, f"--trainer.default_root_dir={tmp_path}"]
    run_script(str(ROOT / "examples" / "digits.py"), *flags)
    (saved,) = tmp_path.glob("**/config.yaml")
    names = [cb["class_path"] for cb in yaml.safe_load(saved.read_text())["trainer"]["callbacks"]]
    assert names == ["lightning_reg.L1Penalty", "lightning_reg.DropoutInjection"]


class WithData(Classifier):
    """A model with its own data, for a command line without a data module."""

    def train_dataloader(self):
        return loader(32)


def as_config(value):
    """Return the YAML form of a callback or schedule: its class and its non-default arguments."""
    arguments = inspect.signature(type(value)).parameters
    given = {name: value._repr_value(name) for name in arguments}
    needed = {name: argument for name, argument in given.items() if argument != arguments[name].default}
    plain = {name: as_config(argument) if isinstance(argument, Schedule) else argument for name, argument in needed.items()}
    return {"class_path": f"lightning_reg.{type(value).__name__}", "init_args": plain}


def as_flags(callback):
    """Return a callback as command-line flags, with short class names."""
    flags = [f"--trainer.callbacks+={type(callback).__name__}"]
    for name, value in as_config(callback)["init_args"].items():
        if isinstance(value, dict):
            flags.append(f"--trainer.callbacks.{name}={value['class_path'].rpartition('.')[2]}")
            flags += [f"--trainer.callbacks.{name}.{key}={part}" for key, part in value["init_args"].items()]
        else:
            flags.append(f"--trainer.callbacks.{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return flags


def parse(*args, run=False):
    """Return the regularizers of a command line, and the model, trained if ``run`` is true."""
    quiet = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]
    command = ["fit"] if run else []
    cli = LightningCLI(
        WithData,
        args=[*command, *quiet, "--trainer.max_epochs=1", *args],
        run=run,
        seed_everything_default=0,
        save_config_callback=None,
    )
    return regularizers(cli), cli.model


def with_unique_names(callbacks):
    """Give each callback a unique name, which several callbacks of one class need."""
    return [type(cb)(**{**vars_of(cb), "name": f"number {index}"}) for index, cb in enumerate(callbacks)]


@pytest.mark.parametrize("kind", ["active", "scheduled"])
def test_flags_of_every_callback(kind):
    expected = [getattr(row, kind)() for row in ROWS.values() if getattr(row, kind)]
    by_flags, _ = parse(*(flag for callback in expected for flag in as_flags(callback)))
    assert list(map(repr, by_flags)) == list(map(repr, expected))


def test_yaml_of_every_callback(tmp_path):
    expected = with_unique_names([callback for row in ROWS.values() for callback in row.all()])
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": list(map(as_config, expected))}}))
    by_yaml, _ = parse("--config", str(tmp_path / "all.yaml"))
    assert list(map(repr, by_yaml)) == list(map(repr, expected))


def test_printed_config_of_every_callback_reproduces_run(tmp_path, capsys):
    flags = [flag for callback in everything() for flag in as_flags(callback)]
    with pytest.raises(SystemExit):
        parse(*flags, "--print_config", run=True)
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    _, by_flags = parse(*flags, run=True)
    _, by_yaml = parse("--config", str(tmp_path / "printed.yaml"), run=True)
    assert same(by_flags, by_yaml)
    assert not same(by_flags, parse(run=True)[1])
