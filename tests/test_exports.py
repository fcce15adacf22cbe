"""Nothing that belongs to a technique is missing from the public namespaces."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
from processes import ROOT, run_script

import lightning_reg
from lightning_reg import custom, functional
from lightning_reg._engine.regularizer import Regularizer

KINDS = ("constraints", "dropout", "gradients", "penalties", "pruning", "shrinkage")
BASES = {*custom.__all__, "GradientClipping"}
HELPERS = {"injections_of"}


def public(module, kind):
    """Return the public classes or functions that a module defines, by name."""
    found = inspect.getmembers(module, lambda member: kind(member) and member.__module__ == module.__name__)
    return {name: member for name, member in found if not name.startswith("_")}


PACKAGES = [importlib.import_module(f"lightning_reg.{kind}") for kind in KINDS]
MODULES = [
    importlib.import_module(found.name)
    for package in PACKAGES
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
CALLBACKS = {
    module: {name for name, cls in public(module, inspect.isclass).items() if issubclass(cls, Regularizer)} - BASES
    for module in MODULES
}


def test_every_callback_is_exported():
    """From the package of its kind, and from ``lightning_reg``."""
    defined = set().union(*CALLBACKS.values())
    assert len(defined) > 20
    assert defined - set(lightning_reg.__all__) == set()
    assert defined - {name for package in PACKAGES for name in package.__all__} == set()


def test_every_function_beside_a_callback_is_exported():
    """From ``lightning_reg.functional``, or from ``lightning_reg``; a name with an underscore says that it is private."""
    defined = {name for module, callbacks in CALLBACKS.items() if callbacks for name in public(module, inspect.isfunction)}
    assert len(defined) > 20
    assert defined - {*vars(functional), *lightning_reg.__all__} == HELPERS


@pytest.mark.slow
def test_the_benchmarks_start():
    """They import the table and everything that it needs, in a process of their own."""
    printed = run_script("-m", "tests.benchmarks", "--help", folder=ROOT)
    assert "--seconds" in printed
