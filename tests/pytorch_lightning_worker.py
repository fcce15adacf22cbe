"""A process that does the same with both packages of Lightning, and saves what comes of it.

Started by ``test_pytorch_lightning.py``, with the name of the package to import first, a folder, and a file for the results.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import traceback
import types
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    importlib.import_module(sys.argv[1])
    LOADED = set(sys.modules)

import lightning.pytorch.cli
import pytorch_lightning.cli
import torch
import yaml
from helpers import QUIET, Classifier, Memory, loader, validating
from table import ROWS, everything
from test_cli import as_config, as_flags
from torch import nn

from lightning_reg import ActivityPenalty, DropoutScheduler, L1Penalty, Linear, MonteCarloDropout, WeightPruning
from lightning_reg._engine import _lightning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_reg.custom import Regularizer

PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
MISTYPED: dict[str, Callable[[], Regularizer]] = {
    "parameter": lambda: L1Penalty(0.1, params="net.0.weights"),
    "modules": lambda: ActivityPenalty(0.1, modules="RelU"),
    "dropout": lambda: DropoutScheduler(0.1, modules="net.33"),
}


class Later:
    """A mixin for a model that builds its layers only when the fit starts."""

    def configure_model(self: Any) -> None:
        self.later = nn.Linear(2, 2)


class Fails:
    """A mixin for a model that fails in its second batch."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("in the second batch")
        return super().training_step(batch, batch_idx)


def classifier(package: Any, *mixins: type) -> Any:
    """Return ``helpers.Classifier`` as a module of a package, with the same weights and a data loader."""

    class Twin(package.LightningModule):
        on_train_batch_start = Classifier.on_train_batch_start
        training_step = Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

        def __init__(self, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0, validates: bool = False) -> None:
            super().__init__()
            if validates:
                self.__class__ = validating(type(self))
            model = Classifier(lr, momentum, weight_decay)
            self.lr, self.momentum, self.weight_decay, self.net = lr, momentum, weight_decay, model.net

        def train_dataloader(self) -> Any:
            return loader()

        def predict_dataloader(self) -> Any:
            return loader(32)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    return type("Twin", (*mixins, Twin), {})


def plain(value: Any) -> Any:
    """Return a value as what JSON can hold: numbers keep every bit."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value


def trained(package: Any, callbacks: Sequence[Any], model: Any = None, resume: Path | None = None, **trainer: Any) -> Any:
    """Train, and return the weights and everything that was logged."""
    model = model or classifier(package)()
    memory = type("Memory", (package.loggers.logger.Logger,), {**vars(Memory), "__init__": _init})()
    options = {**QUIET, "max_epochs": 2, "log_every_n_steps": 1, "logger": memory, **trainer}
    fitted = package.Trainer(**options, callbacks=list(callbacks))
    fitted.fit(model, ckpt_path=resume)
    return plain({"weights": model.state_dict(), "logged": memory.steps, "monitored": fitted.callback_metrics})


def _init(self: Any) -> None:
    super(type(self), self).__init__()
    self.steps = {}


def active(package: Any, name: str) -> Any:
    """Train with the active callback of a row."""
    row = ROWS[name]
    return trained(package, [row.active()], classifier(package)(**row.options))


def saved(package: Any, name: str, folder: Path, resume: Path | None = None) -> Any:
    """Train with the callback of a row, with accumulation that changes, and leave a checkpoint of each epoch in a folder."""
    row = ROWS[name]
    checkpoints = package.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    callbacks = [(row.scheduled or row.active)(), accumulation(package), checkpoints]
    return trained(package, callbacks, classifier(package)(**row.options), resume, enable_checkpointing=True)


def accumulation(package: Any) -> Any:
    """Return a callback for steps of one batch in the first epoch, and of two batches after it."""
    return package.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})


def resumed(package: Any, name: str, folder: Path) -> Any:
    """Train, and resume after the first epoch in this package and in the other; return all results and what was saved."""
    uninterrupted = saved(package, name, folder)
    states = torch.load(folder / "epoch=0.ckpt", weights_only=False)["callbacks"]
    states = {key: state for key, state in states.items() if key.startswith(name)}
    rests = [saved(other, name, folder / "rest", folder / "epoch=0.ckpt") for other in PACKAGES.values()]
    return {"whole": uninterrupted, "rests": rests, "states": plain(states)}


def counted(package: Any) -> Any:
    """Train with a schedule over a number of optimizer steps."""
    return trained(package, [L1Penalty(Linear(0.0, 0.6, until="6st")), accumulation(package)])


def averaged(package: Any, callback: Any) -> Any:
    """Train with averages of the weights, of a model with batch normalization."""
    model = classifier(package)()
    model.net[1] = nn.BatchNorm1d(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWA replaces the schedule of the rate
        return trained(package, [*everything(), L1Penalty(Linear(0.0, 0.1), name="to the end"), callback], model, max_epochs=4)


def predicted(package: Any) -> Any:
    """Return samples of predictions, with dropout and without."""
    torch.manual_seed(0)
    trainers = [package.Trainer(**QUIET, callbacks=made) for made in ([MonteCarloDropout(samples=3)], [])]
    return plain([trainer.predict(classifier(package)()) for trainer in trainers])


def error(act: Callable[[], Any]) -> str:
    """Return the error that a call raises, with its class."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mistyped(package: Any, make: Callable[[], Regularizer]) -> str:
    """Return the error about a callback."""
    return error(lambda: trained(package, [make()]))


def printed(act: Callable[[], Any]) -> str:
    """Return what a call prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        act()
    return stdout.getvalue()


def summary(package: Any, shown: bool) -> str:
    """Return what this package prints around a fit."""
    text = printed(lambda: trained(package, [L1Penalty(0.1), WeightPruning(0.5)], enable_model_summary=shown))
    return text[text.find("Regularization") :] if "Regularization" in text else ""


def left(package: Any) -> Any:
    """Return what a fit that failed leaves in the model."""
    model = classifier(package, Fails)()
    message = error(lambda: trained(package, everything(), model))
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return [message, hooks, list(model.state_dict()), model.net[3].p, "training_step" in vars(model.trainer.strategy)]


def warned(package: Any) -> list[str]:
    """Return the warnings about a callback without effect."""
    model = classifier(package)()
    model.net[0].requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(package, [L1Penalty(0.1, params="net.0.*")], model)
    return [f"{w.category.__name__}: {w.message}" for w in caught if "L1Penalty" in str(w.message)]


def strategies(package: Any) -> Any:
    """Return what is told of strategies, none of which can run here."""
    made = [object.__new__(getattr(package.strategies, f"{name}Strategy")) for name in ("FSDP", "DeepSpeed", "DDP")]
    trainers = [types.SimpleNamespace(strategy=strategy) for strategy in made]
    return [[_lightning.uses_fsdp1(trainer), _lightning.uses_deepspeed(trainer)] for trainer in trainers]


def command_line(package: Any, folder: Path) -> dict[str, Any]:
    """Return the callbacks that flags and YAML make, and what they train."""
    quiet = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]

    def run(*args: str) -> Any:
        arguments = [*quiet, "--trainer.max_epochs=1", *args]
        cli = package.cli.LightningCLI(classifier(package), args=arguments, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model)
        made = [repr(callback) for callback in cli.trainer.callbacks if type(callback).__module__.startswith("lightning_reg")]
        return {"made": made, "weights": plain(cli.model.state_dict())}

    (folder / "all.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": list(map(as_config, everything()))}}))
    return {
        "flags": run(*(flag for callback in everything() for flag in as_flags(callback))),
        "yaml": run("--config", str(folder / "all.yaml")),
    }


def checks(package: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return everything that is done with a package, by name."""
    averaging = [package.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2), package.callbacks.EMAWeightAveraging()]
    return {
        "plain": lambda: trained(package, []),
        "everything": lambda: trained(package, everything()),
        **{f"active {name}": partial(active, package, name) for name in ROWS},
        **{f"resumed {name}": partial(resumed, package, name, folder / name) for name in ROWS},
        **{f"averaged by {type(callback).__name__}": partial(averaged, package, callback) for callback in averaging},
        **{f"mistyped {name}": partial(mistyped, package, make) for name, make in MISTYPED.items()},
        "layers built later": lambda: trained(package, [L1Penalty(0.1, params="later.*")], classifier(package, Later)()),
        "same name": lambda: error(lambda: package.Trainer(**QUIET, callbacks=[L1Penalty(0.1), L1Penalty(0.2)])),
        "class": lambda: error(lambda: package.Trainer(**QUIET, callbacks=[WeightPruning(0.5), L1Penalty])),
        "steps": partial(counted, package),
        "predictions": partial(predicted, package),
        "summary": partial(summary, package, True),
        "no summary": partial(summary, package, False),
        "left": partial(left, package),
        "warned": partial(warned, package),
        "strategies": partial(strategies, package),
        "command line": partial(command_line, package, folder),
    }


def result(check: Callable[[], Any]) -> Any:
    """Return the result of a check, or where it failed."""
    try:
        return check()
    except (Exception, SystemExit):
        return {"traceback": traceback.format_exc()}


def main(folder: Path, results: Path) -> None:
    """Do everything with both packages."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"loaded at first": sorted(name for name in LOADED if "." not in name)}
    for name, package in PACKAGES.items():
        (folder / name).mkdir()
        found[name] = {what: result(check) for what, check in checks(package, folder / name).items()}
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[3]))
