"""Package structure: no import cycles, few public namespaces, and no technique that bypasses the base class."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from lightning.pytorch import Callback

import lightning_reg
from lightning_reg.custom import Regularizer

ROOT = Path(lightning_reg.__file__).parent
MODULES = {
    info.name: ROOT.parent.joinpath(*info.name.split(".")) for info in pkgutil.walk_packages([str(ROOT)], "lightning_reg.")
}
PUBLIC = {"lightning_reg", *(f"lightning_reg.{name}" for name in ("custom", "functional", "schedules", "tuning.statistics"))}
PACKAGES = {"constraints", "dropout", "gradients", "monitors", "penalties", "pruning", "shrinkage", "tuning"}


def tree_of(name):
    path = MODULES[name]
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imports_of(name):
    """Return the package modules that a module imports, including imports for type checking and within functions."""
    imported = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {n for n in names if n in MODULES} or {node.module}
    return {module for module in imported if module in MODULES}


def find_cycle(graph):
    """Return a cycle in a graph of imports, or ``None``."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        path.append(node)
        cycle = next(filter(None, map(visit, sorted(graph[node]))), None)
        path.pop()
        done.add(node)
        return cycle

    return next(filter(None, map(visit, sorted(graph))), None)


def test_no_import_cycle():
    assert len(MODULES) > 40
    assert find_cycle({name: imports_of(name) for name in MODULES}) is None


def test_find_cycle_detects_cycle():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_public_namespaces_define_all(name):
    assigned = {
        t.id for node in tree_of(name).body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    public = name in PUBLIC or name.removeprefix("lightning_reg.") in PACKAGES
    assert not ("__all__" in assigned and not public)


def test_private_modules_start_with_underscore():
    visible = {name.split(".")[1] for name in MODULES}
    assert {name for name in visible if not name.startswith("_")} == PACKAGES | {"custom", "functional", "schedules"}


def callbacks():
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if inspect.isclass(value) and issubclass(value, Regularizer) and value is not Regularizer:
                yield value


HOOKS = {
    name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown", "state_dict", "load_state_dict")
}


def test_no_technique_overrides_lightning_hooks():
    """The driver calls techniques at the right time and in the right order, whatever the list order."""
    overridden = {
        (cls.__name__, hook) for cls in callbacks() for hook in HOOKS if getattr(cls, hook) is not getattr(Regularizer, hook)
    }
    assert not overridden
    assert len(HOOKS) > 30
    assert len(set(callbacks())) > 30
