"""Modules whose own code applies dropout: the code reads a rate, and whether the module is in training mode.

Attention code often does so, as in ``dropout_p=self.drop.p if self.training else 0.0``. Then the mode of the attention module
counts, not that of ``self.drop``. The source code of a class shows which rates it reads, and whether training mode changes
anything else.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _NormBase

from lightning_reg._engine.arguments import PROBABILITY
from lightning_reg._engine.names import canonical_name, class_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import nn

_LIBRARIES = (  # whose base classes read the mode for other reasons, or whose dropout is known
    "torch.",
    "lightning.pytorch.core.",
    "lightning.fabric.",
    "pytorch_lightning.core.",
    "lightning_fabric.",
    "lightning_reg.",
)
_NAMES = {"training", "p", "dropout", "drop_prob"}  # code that has none of these is not read
_ENTRIES = ("forward", "__call__", "predict_step")


@dataclass(frozen=True)
class _Code:
    """What the code of a class reads.

    Args:
        rates: The attributes that it uses as dropout rates, in training mode only: ``"drop.p"``, ``"attention_dropout"``.
        paths: All attributes that it reads through others, such as ``"drop.p"``.
        flags: Groups of attributes. If all attributes of a group are true, its source code does something else in training
            mode.
        others: What else it does in training mode, as source code.
    """

    rates: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()
    flags: frozenset[tuple[frozenset[str], str]] = frozenset()
    others: tuple[str, ...] = ()

    def __or__(self, code: _Code) -> _Code:
        others = tuple(dict.fromkeys(self.others + code.others))
        return _Code(self.rates | code.rates, self.paths | code.paths, self.flags | code.flags, others)


@dataclass
class Reader:
    """A module whose own code applies dropout.

    Args:
        name: The qualified name of the module.
        module: The module.
        rates: The rates that it applies in training mode, by attribute.
        reads: The keys of the dropout sites whose rates it reads.
        others: What else it does in training mode, as source code.
    """

    name: str
    module: nn.Module
    rates: dict[str, float]
    reads: frozenset[tuple[int, str]]
    others: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return class_name(self.module)

    @property
    def is_switchable(self) -> bool:
        """Whether training mode switches its dropout on and changes nothing else."""
        return any(self.rates.values()) and not self.others

    @property
    def stays_off(self) -> bool:
        """Whether training mode would switch on its dropout, but would also change something else."""
        return any(self.rates.values()) and bool(self.others)

    @property
    def own_attributes(self) -> list[str]:
        """The attributes of the module itself that are rates."""
        return sorted(path for path in self.rates if "." not in path)


def find_readers(module: nn.Module) -> list[Reader]:
    """Return the modules whose own code applies dropout, in the order of the model.

    torch's own modules are left out, because their rates are known.

    Args:
        module: The model.

    Example:
        >>> from torch import nn
        >>> find_readers(nn.TransformerEncoderLayer(8, 2))
        []
    """
    found = []
    for name, submodule in module.named_modules():
        cls: Any = type(submodule)
        code = _code_of(cls)
        rates = {path: rate for path in sorted(code.rates) if (rate := _rate_at(submodule, path)) is not None}
        reads = {(id(_owner_at(submodule, path)), path.rpartition(".")[2]) for path in code.paths}
        if (rates or reads) and not isinstance(submodule, _NormBase):  # its statistics would change
            flagged = sorted(line for flags, line in code.flags if all(getattr(submodule, flag, True) for flag in flags))
            found.append(Reader(canonical_name(name), submodule, rates, frozenset(reads), (*code.others, *flagged)))
    return found


def suggested_attributes(readers: Iterable[Reader], known: Collection[tuple[int, str]]) -> dict[str, str | list[str]]:
    """Return ``attributes`` that register rates in the modules' own attributes, except for rates already known."""
    found: dict[str, list[str]] = {}
    for reader in readers:
        for attribute in reader.own_attributes:
            if (id(reader.module), attribute) not in known and attribute not in found.setdefault(reader.kind, []):
                found[reader.kind].append(attribute)
    return {kind: names[0] if len(names) == 1 else names for kind, names in found.items() if names}


def _rate_at(module: nn.Module, path: str) -> float | None:
    """Return the float in [0, 1] at a path of attributes, or ``None``."""
    value = getattr(_owner_at(module, path), path.rpartition(".")[2], None)
    return value if isinstance(value, float) and value in PROBABILITY else None


def _owner_at(module: nn.Module, path: str) -> Any:
    """Return the object that has the last attribute of a path."""
    owner: Any = module
    for parent in path.split(".")[:-1]:
        owner = getattr(owner, parent, None)
    return owner


# The source code of classes ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _code_of(cls: Any) -> _Code:
    """Read the methods that the forward pass of a class uses, its own and inherited ones, except from libraries."""
    code = _Code()
    for function in _functions_of(cls):
        code |= _FunctionReader(function, drops="drop" in cls.__name__.lower()).code
    return code


def _functions_of(cls: type) -> Iterator[FunctionType]:
    """Yield the methods that can be reached from the forward pass."""
    waiting, seen = list(_ENTRIES), {"__init__", "train", "eval", *_ENTRIES}
    while waiting:
        name = waiting.pop()
        for function in _definitions(cls, name):
            yield function
            names = _names_in(function.__code__) - seen
            seen |= names
            waiting += sorted(names)


def _definitions(cls: type, name: str) -> Iterator[FunctionType]:
    """Yield the definition of a method, and as long as it calls ``super()``, the definition that it overrides."""
    for base in cls.__mro__:
        value = vars(base).get(name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(value) if callable(value) else None
        if isinstance(function, FunctionType):
            if f"{base.__module__}.".startswith(_LIBRARIES):
                return
            yield function
            if "super" not in _names_in(function.__code__):
                return


def _names_in(code: CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, nested))


def _tree_of(function: FunctionType) -> ast.AST | None:
    """Return the parsed source code of a function; ``None`` if there is none, or the file has changed since the import."""
    try:
        source = "".join(inspect.findsource(function)[0])
        if function.__code__ in _compiled(source):
            return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, ValueError, SyntaxError):  # as in an interactive session
        pass
    return None


@lru_cache(maxsize=64)
def _compiled(source: str) -> set[CodeType]:
    """Compile a file, and return the code of all of its functions."""
    waiting, found = [compile(source, "<source>", "exec", dont_inherit=True)], set()
    while waiting:
        code = waiting.pop()
        found.add(code)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


class _FunctionReader:
    """Reads the source code of a method.

    Args:
        function: The method.
        drops: Whether its class is for dropout, so that an early return out of training mode is dropout too.
    """

    def __init__(self, function: FunctionType, drops: bool) -> None:
        self.drops = drops
        self.code = _Code()
        if not _NAMES & _names_in(function.__code__):
            return
        if (tree := _tree_of(function)) is None:
            if "training" in _names_in(function.__code__):
                self.code = _Code(others=(f"{function.__qualname__}, whose source code is unknown",))
            return
        self.tree = tree
        self.owner = function.__code__.co_varnames[0] if function.__code__.co_argcount else ""
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        paths = {path for node in ast.walk(self.tree) if "." in (path := self._path(node))}
        self.code = _Code(paths=frozenset(paths))
        for node in ast.walk(self.tree):
            if self._path(node) == "training":
                self.code |= self._use_of(node)

    def _use_of(self, node: ast.AST) -> _Code:
        """Return what a read of ``self.training`` is for."""
        flags: set[str] = set()
        parent = self.parents[node]
        while isinstance(parent, (ast.UnaryOp, ast.BoolOp)):
            if isinstance(parent, ast.BoolOp) and isinstance(parent.op, ast.And):
                flags |= {flag for value in parent.values if (flag := self._flag(value))}
            node, parent = parent, self.parents[parent]
        if isinstance(parent, ast.keyword):
            parent = self.parents[parent]
        rates = self._rates_of_use(parent, node)
        if rates is not None:
            return _Code(rates=frozenset(rates))
        line = ast.unparse(parent).splitlines()[0]
        return _Code(flags=frozenset({(frozenset(flags), line)})) if flags else _Code(others=(line,))

    def _rates_of_use(self, parent: ast.AST, node: ast.AST) -> set[str] | None:
        """Return the attributes that are rates if training mode is read for dropout, otherwise ``None``."""
        if isinstance(parent, ast.Call) and node is not parent.func:
            return self._rates_of_call(parent) if self._is_dropout(parent) else None
        if isinstance(parent, ast.IfExp) and node is parent.test:
            on = [branch for branch in (parent.body, parent.orelse) if not _is_zero(branch)]
            return self._rates_in(on[0], self.parents[parent]) or None if len(on) == 1 else None
        if isinstance(parent, ast.If) and node is parent.test:
            return self._rates_of_branch(parent)
        return None

    def _rates_of_branch(self, branch: ast.If) -> set[str] | None:
        """Return the rates of a statement that does nothing but dropout in training mode, otherwise ``None``."""
        if self.drops and not branch.orelse and isinstance(branch.body[0], ast.Return):  # if not self.training: return x
            return self._paths_in(branch.test)
        rates: set[str] = set()
        for statement in branch.body:
            value = statement.value if isinstance(statement, (ast.Assign, ast.Return)) else None
            if isinstance(value, ast.Call) and self._is_dropout(value):
                rates |= self._rates_of_call(value)
            elif isinstance(statement, ast.Assign) and (found := self._rates_in(statement.value, statement)):
                rates |= found
            else:
                return None
        others = (statement.value if isinstance(statement, ast.Assign) else None for statement in branch.orelse)
        return rates if all(value is not None and _is_zero(value) for value in others) else None

    def _is_dropout(self, call: ast.Call) -> bool:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        return "drop" in name.lower()

    def _rates_of_call(self, call: ast.Call) -> set[str]:
        """Return the attributes in all arguments except the first, which is the input of the dropout."""
        return {path for part in (*call.args[1:], *call.keywords) for path in self._paths_in(part)}

    def _rates_in(self, node: ast.AST, user: ast.AST) -> set[str]:
        """Return the attribute that an expression reads as a dropout rate, judging by its own name or by what uses it."""
        inner = node.args[0] if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "float" and node.args else node
        path = self._path(inner)
        names = [path, getattr(user, "arg", None), *(getattr(target, "id", None) for target in getattr(user, "targets", ()))]
        is_rate = path.endswith(".p") or any("drop" in name.lower() for name in names if name)
        return {path} if path and (is_rate or (isinstance(user, ast.Call) and self._is_dropout(user))) else set()

    def _paths_in(self, node: ast.AST) -> set[str]:
        paths = {self._path(part) for part in ast.walk(node) if not isinstance(self.parents[part], ast.Attribute)}
        return paths - {"", "training"}

    def _path(self, node: ast.AST) -> str:
        """Return ``"drop.p"`` for ``self.drop.p``, and ``""`` for anything else."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == self.owner else ""

    def _flag(self, node: ast.AST) -> str:
        """Return the attribute that decides whether an expression is true: ``self.flag``, ``self.flag > 0``."""
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Gt) and _is_zero(node.comparators[0]):
            node = node.left
        path = self._path(node)
        return "" if "." in path or path == "training" else path


def _is_zero(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not node.value
