"""Real calls of LightningCLI through the example's script: flags, YAML, and the configuration that it prints."""

from __future__ import annotations

import inspect

import digits
import docstring_parser
import pytest
import yaml
from helpers import QUIET, same
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from processes import HERE, run_script
from table import ROWS

import lightning_reg
from lightning_reg import Cosine, DropoutInjection, DropoutScheduler, L1Penalty, Linear

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


def test_the_printed_configuration_reproduces_the_run(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(*FLAGS, "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert same(run(*FLAGS).model, run("--config", str(tmp_path / "printed.yaml")).model)
    assert not same(run(*FLAGS).model, run().model)


def test_a_depth_profile_in_yaml(tmp_path):
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
    cli = run("--config", str(HERE.parent / "examples" / "digits.yaml"), "--trainer.max_epochs=1")
    assert repr(regularizers(cli)[1]) == repr(lightning_reg.L2Penalty(Linear(0.0, 1e-3, until=0.5)))
    assert len(regularizers(cli)) == len(digits.regularization())


@pytest.mark.parametrize("name", ROWS)
def test_help_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit):
        run(f"--trainer.callbacks.help={name}")
    shown = " ".join(capsys.readouterr().out.split())
    explained = docstring_parser.parse(getattr(lightning_reg, name).__doc__).params
    arguments = inspect.signature(getattr(lightning_reg, name)).parameters
    assert [argument.arg_name for argument in explained] == list(arguments)
    for argument in explained:
        assert f"--trainer.callbacks.{argument.arg_name}" in shown
        assert " ".join(argument.description.split()) in shown


def test_bad_values_are_refused_with_the_reason(capsys):
    with pytest.raises(SystemExit):
        run("--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=strong")
    assert "strength" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"L1Penalty: strength must be a number in \[0, inf\), got -1.0"):
        run("--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=-1")


def test_the_script_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SHORT, *FLAGS, f"--trainer.default_root_dir={tmp_path}"]
    run_script(str(HERE.parent / "examples" / "digits.py"), *flags)
    (saved,) = tmp_path.glob("**/config.yaml")
    names = [cb["class_path"] for cb in yaml.safe_load(saved.read_text())["trainer"]["callbacks"]]
    assert names == ["lightning_reg.L1Penalty", "lightning_reg.DropoutInjection"]
