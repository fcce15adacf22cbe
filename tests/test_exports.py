"""The public namespaces contain everything that belongs to a technique."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
from processes import ROOT, run_script

import lightning_reg
from lightning_reg import custom, functional
from lightning_reg._engine.regularizer import Regularizer

KINDS = ("constraints", "dropout", "gradients", "monitors", "penalties", "pruning", "shrinkage")
BASES = {*custom.__all__, "ElementwisePenalty", "GradientClipping", "MaskedRegularizer", "RewindingRegularizer"}
HELPERS = {"injections_of", "penalty_of_all"}


def public(module, kind):
    """Return the public classes or functions that a module defines, by name."""
    found_members = inspect.getmembers(module, lambda member: kind(member) and member.__module__ == module.__name__)
    return {name: member for name, member in found_members if not name.startswith("_")}


PACKAGES = [importlib.import_module(f"lightning_reg.{kind}") for kind in KINDS]
MODULES = [
    importlib.import_module(info.name)
    for package in PACKAGES
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
CALLBACKS = {
    module: {name for name, cls in public(module, inspect.isclass).items() if issubclass(cls, Regularizer)} - BASES
    for module in MODULES
}


def test_every_callback_is_exported():
    """From the package of its group and from ``lightning_reg``."""
    defined = set().union(*CALLBACKS.values())
    assert len(defined) > 20
    assert defined - set(lightning_reg.__all__) == set()
    assert defined - {name for package in PACKAGES for name in package.__all__} == set()


def test_every_technique_function_is_exported():
    """From ``lightning_reg.functional`` or ``lightning_reg``, unless its name starts with an underscore."""
    defined = {name for module, callbacks in CALLBACKS.items() if callbacks for name in public(module, inspect.isfunction)}
    assert len(defined) > 20
    assert defined - {*vars(functional), *lightning_reg.__all__} == HELPERS


@pytest.mark.slow
def test_benchmarks_start():
    """In a new process, which imports the table and all that it needs."""
    printed = run_script("-m", "tests.benchmarks", "--help", folder=ROOT)
    assert "--seconds" in printed
