"""Every kind of value of every argument of every callback can be written, printed, saved, and read again."""

from __future__ import annotations

import inspect
import math
import re
import sys
import types
import typing

import importable
import numpy as np
import pytest
import torch
import yaml
from helpers import QUIET, Classifier, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from table import ROWS
from test_cli import as_config
from torch import nn

import lightning_reg
from lightning_reg import (
    Cosine,
    DropoutInjection,
    DropoutScheduler,
    L1Penalty,
    L2Penalty,
    Linear,
    WeightPruning,
    custom,
    select_parameters,
)
from lightning_reg._engine.command_line import Infinity, path_of
from lightning_reg._engine.regularizer import Regularizer
from lightning_reg.schedules import Schedule, SequentialSchedule, Steps

pytestmark = pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter is intended")

SCHEDULES = [cls for cls in vars(lightning_reg).values() if isinstance(cls, type) and issubclass(cls, Schedule)]
FLAGS = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]


class WithData(Classifier):
    """A model with its own data, for a command line without a data module."""

    def train_dataloader(self):
        return loader(32)


# The table of values ------------------------------------------------------------------------------------------------


def spec(cls, **arguments):
    """Return the YAML form of an object of a class."""
    return {
        "class_path": f"{cls.__module__ if cls.__module__ == 'importable' else 'lightning_reg'}.{cls.__name__}",
        "init_args": arguments,
    }


def scheduled(cls, number):
    """Return the YAML form of a schedule of a class, with this number as each of its values."""
    if cls is SequentialSchedule:
        return spec(cls, schedules=[scheduled(Cosine, number), number, "importable.rising"], at=["1st", 0.5])
    values = {"values": [number, number], "at": ["1st"]} if cls is Steps else {"start": number, "end": number}
    return spec(cls, **values, **({"begin": "1st", "until": 0.5} if cls is Linear else {}))


def values_in(interval, takes_mapping):
    """Return all kinds of values of an argument that may be scheduled."""
    plain = [0.5, *[n for n in (0, 1) if n in interval][:1]]
    infinite = ["inf", "Infinity", math.inf] if math.inf in interval else []
    in_schedules = [scheduled(cls, 0.5) for cls in SCHEDULES]
    functions = ["importable.rising", "importable.rising_object"]
    classes = [spec(importable.Rising, start=0.2), spec(importable.Rising)]
    in_mapping = [{"net.3": value, 3: value} for value in [*plain, *in_schedules, *functions]] if takes_mapping else []
    return [*plain, *infinite, *in_schedules, *functions, *classes, *in_mapping]


FOR_NAMES = {
    "params": [
        "all",
        "weights:net.*",
        ["all", "!norms"],
        "importable:in_first_layer",
        spec(importable.InLayer, layer="net.4"),
    ],
    "modules": ["ReLU", ["net.*", "!net.0"]],
    "after": ["ReLU", ["net.*", "!net.0"]],
    "criterion": ["importable.magnitudes", "importable.magnitudes_object", spec(importable.Magnitudes)],
    "attributes": [{"Attention": "rate"}, {"Attention": ["rate", "drop"]}, {}],
    "shared_dims": [[1], [1, 2]],
}
"""Values of arguments whose types do not say enough, by the name of the argument."""

FOR_KINDS = {bool: [True, False], types.NoneType: [None], int: [7], float: [0.5], Infinity: ["inf"]}
"""Values by the type of the argument."""

NEEDED = {"MinMaxNorm": {"min_norm": 0.2, "max_norm": 2.0}, "WeightPruning": {"params": "net.*"}}
"""What other values need, by callback."""


def values_of(cls, argument, hint):
    """Return all kinds of values of an argument."""
    if argument.name in cls.valid_ranges:
        return values_in(cls.valid_ranges[argument.name], argument.name in cls.accept_mappings)
    default = [] if argument.default is inspect.Parameter.empty else [argument.default]
    members = list(flattened(hint))
    literals = [value for kind in members if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)]
    of_kinds = [value for kind in members for value in FOR_KINDS.get(kind, [])]
    return [*default, *literals, *of_kinds, *FOR_NAMES.get(argument.name, [])]


def flattened(hint):
    """Yield the members of a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from flattened(member)
    else:
        yield hint


def hints_of(cls):
    """Return the types of a constructor's arguments. Modules import some of their names only for type checkers."""
    names = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_reg"):
            names |= vars(module)
    return typing.get_type_hints(cls.__init__, names)


def arguments_of(cls):
    """Return the arguments of a constructor, without the name."""
    return [argument for argument in inspect.signature(cls).parameters.values() if argument.name != "name"]


def cases(callback):
    """Return the YAML form of a callback for each value of each argument, by the name that it gets."""
    cls, found = getattr(lightning_reg, callback), {}
    hints = hints_of(cls)
    needed = {**as_config(ROWS[callback].active())["init_args"], **NEEDED.get(callback, {})}
    for argument in arguments_of(cls):
        for index, value in enumerate(values_of(cls, argument, hints[argument.name])):
            name = f"{argument.name} {index}"
            found[name] = spec(cls, **{**needed, argument.name: value, "name": name})
    return found


# The laws -----------------------------------------------------------------------------------------------------------


def parser():
    """Return LightningCLI's parser with callbacks alone, which is much faster."""
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    return parser


def made(config):
    """Return the callbacks of a configuration, as their repr, by name."""
    return {callback.name: repr(callback) for callback in parser().instantiate_classes(config).callbacks}


def written(folder, callbacks):
    """Write callbacks to a configuration file, and return the flags that read it."""
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({"callbacks": list(callbacks)}))
    return ["--config", str(path)]


@pytest.mark.filterwarnings("ignore")  # as for users: jsonargparse only warns of what it cannot save
@pytest.mark.parametrize("callback", ROWS)
def test_every_value_of_every_argument_survives_print_and_save(callback, tmp_path):
    given = cases(callback)
    config = parser().parse_args(written(tmp_path, given.values()))
    expected = made(config)
    assert list(expected) == list(given)
    (tmp_path / "printed.yaml").write_text(parser().dump(config))  # as --print_config does
    parser().save(config, tmp_path / "saved.yaml", skip_none=False)  # as SaveConfigCallback does
    for name in ("printed.yaml", "saved.yaml"):
        assert made(parser().parse_args(["--config", str(tmp_path / name)])) == expected


def test_the_table_of_values_is_complete():
    """Each member of each argument's type has a value, except for texts and functions that other members cover."""
    for callback in ROWS:
        cls = getattr(lightning_reg, callback)
        values = {argument.name: values_of(cls, argument, hints_of(cls)[argument.name]) for argument in arguments_of(cls)}
        assert all(values.values()), callback
    given = [value for callback in ROWS for form in cases(callback).values() for value in form["init_args"].values()]
    kinds = {type(value) for value in given}
    assert kinds == {float, int, bool, str, list, dict, types.NoneType}
    specs = {value["class_path"] for value in given if isinstance(value, dict) and "class_path" in value}
    assert {f"lightning_reg.{cls.__name__}" for cls in SCHEDULES} | {"importable.Rising"} <= specs


@pytest.mark.parametrize("value", ["inf", "Infinity", ".inf"])
def test_infinity_in_flags(value):
    flags = ["--callbacks+=GradientNormClipping", f"--callbacks.max_norm={value}", f"--callbacks.norm_type={value}"]
    assert list(made(parser().parse_args(flags)).values()) == ["GradientNormClipping(inf, norm_type=inf)"]


def test_infinity_where_it_is_out_of_range(capsys):
    with pytest.raises(ValueError, match=r"L1Penalty: strength must be a number in \[0, inf\), got inf"):
        made(parser().parse_args(["--callbacks+=L1Penalty", "--callbacks.strength=inf"]))
    with pytest.raises(SystemExit):
        parser().parse_args(["--callbacks+=L1Penalty", "--callbacks.strength=infinite"])
    assert "Expected a <class 'float'>" in capsys.readouterr().err


# Functions ----------------------------------------------------------------------------------------------------------


def test_a_function_given_in_python_is_saved_by_its_path(tmp_path):
    config = parser().parse_object({"callbacks": [spec(L1Penalty, strength=0.1, params=importable.in_first_layer)]})
    parser().save(config, tmp_path / "saved.yaml")
    again = parser().parse_args(["--config", str(tmp_path / "saved.yaml")])
    assert again.callbacks[0].init_args.params == "importable:in_first_layer"
    (first,), (second,) = (parser().instantiate_classes(parsed).callbacks for parsed in (config, again))
    assert first.params is importable.in_first_layer
    assert second.params == "importable:in_first_layer"
    assert first.state_key == second.state_key  # checkpoints of either resume the other
    assert same(fit([first], max_epochs=1), fit([second], max_epochs=1))
    assert not same(fit([second], max_epochs=1), fit([L1Penalty(0.1)], max_epochs=1))


def test_a_function_without_a_path_cannot_be_saved():
    with pytest.raises(ValueError, match=r"<lambda> has no import path: define it with def at the top level of a module"):
        path_of(lambda name, parameter, module: True)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("importable:missing", ValueError, "params='importable:missing' cannot be imported: module 'importable' has no attr"),
        ("nowhere:function", ValueError, "cannot be imported: No module named 'nowhere'; 'nowhere' is not a keyword: the k"),
        ("weight:encoder", ValueError, "'weight' is not a keyword: write 'weights:encoder'"),
        ("importable:rising", TypeError, r"params='importable:rising' must be a function of three arguments, \(name, "),
        ("math:pi", ValueError, "params='math:pi' must be a function, got 3.14"),
        (
            "importable.in_first_layer",
            ValueError,
            "matches 'importable.in_first_layer'; to import a function, write 'imp",
        ),
        ("net.0.weigth", ValueError, "matches 'net.0.weigth'; close matches: net.0.weight"),
        ("[weights, !net.4.*]", ValueError, r"quote each entry of the list, as in '\[\"weights\", \"!head"),
        (["weights", "importable:in_first_layer"], ValueError, "write its import path alone, as in params='importable:in"),
    ],
    ids=["attribute", "module", "keyword", "arguments", "number", "dots", "parameter", "brackets", "list"],
)
def test_texts_that_name_no_parameter_say_what_to_write(params, error, message):
    with pytest.raises(error, match=message):
        select_parameters(Classifier(), params)


def test_a_parameter_with_a_colon_in_its_name():
    module = nn.ParameterDict({"user:item": nn.Parameter(torch.ones(2, 2))})
    assert list(select_parameters(module, "user:item")) == ["user:item"]


def test_modules_in_brackets_say_what_to_write():
    with pytest.raises(ValueError, match=r"'\[ReLU, !head\]'; quote each entry of the list, as in '\[\"ReLU\", \"!head"):
        fit([DropoutInjection(0.1, after="[ReLU, !head]")])


@pytest.mark.parametrize("criterion", [importable.magnitudes, importable.Magnitudes(), "magnitude"])
def test_criteria_train_alike(criterion):
    assert same(fit([WeightPruning(0.5, criterion=criterion)]), fit([WeightPruning(0.5)]))


# Integer keys, base classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", [name for name in ROWS if getattr(lightning_reg, name).accept_mappings])
def test_integer_keys_name_modules(callback):
    """YAML reads the name of the module "3" as a number."""
    cls = getattr(lightning_reg, callback)
    (key,) = cls.accept_mappings
    with_integer, with_text = (cls(**{key: {name: 0.5}}) for name in (3, "3"))
    assert repr(with_integer) == repr(with_text)
    assert with_integer.current == {f"{key}/3": 0.5}


def bases():
    """Return all classes of callbacks in this package that are no technique of their own."""

    def below(cls):
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    ours = [Regularizer, *below(Regularizer)]
    return {cls for cls in ours if cls.__module__.startswith("lightning_reg") and cls.__name__ not in ROWS}


def test_base_classes_are_abstract():
    assert {getattr(custom, name) for name in ("Penalty", "GradientProcessing", "Constraint", "Regularizer")} <= bases()
    for cls in bases():
        assert inspect.isabstract(cls), cls
        arguments = inspect.signature(cls).parameters.values()
        needed = [argument.name for argument in arguments if argument.default is argument.empty]
        with pytest.raises(TypeError, match=f"instantiate abstract class {cls.__name__}"):
            cls(**dict.fromkeys(needed, "all"))


def test_base_classes_are_not_offered(capsys):
    of_one = LightningArgumentParser()
    of_one.add_argument("--callback", type=Callback)
    with pytest.raises(SystemExit):
        of_one.parse_args(["--help"])
    offered = set(re.findall(r"lightning_reg\.(?:\w+\.)*(\w+)", capsys.readouterr().out))
    assert offered == set(ROWS)
    for cls in bases():
        with pytest.raises((SystemExit, TypeError, ValueError)):
            made(parser().parse_args([f"--callbacks+={cls.__module__}.{cls.__name__}", "--callbacks.params=all"]))


# Callables that are no schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (nn.Linear, TypeError, "got the class Linear: create one"),
        (nn.Linear(1, 1), TypeError, "which cannot be called with the progress 0.0: linear"),
        (torch.sigmoid, TypeError, "got sigmoid, which cannot be called with the progress 0.0: sigmoid"),
        (torch.nn.functional.relu, TypeError, "got relu, which cannot be called with the progress 0.0: "),
        (torch.nn.functional.softmax, TypeError, "got softmax, which cannot be called with the progress 0.0: "),
        (lambda: 0.1, TypeError, "takes 0 positional arguments but 1 was given"),
        (lambda progress: None, TypeError, "which returned None of type NoneType for 0.0"),
        (lambda progress: "0.1", TypeError, "which returned '0.1' of type str for 0.0"),
        (lambda progress: torch.tensor(0.1), TypeError, r"which returned a tensor of shape \(\) of type Tensor for 0.0"),
        (lambda progress: progress > 0.5, TypeError, "which returned False of type bool for 0.0"),
        (lambda progress: progress - 1, ValueError, r"at progress 0 must be a number in \[0, inf\), got -1.0"),
        (lambda progress: math.nan, ValueError, r"at progress 0 must be a number in \[0, inf\), got nan"),
    ],
    ids=[
        "class",
        "module",
        "builtin",
        "function",
        "attribute",
        "arity",
        "none",
        "text",
        "tensor",
        "bool",
        "negative",
        "nan",
    ],
)
def test_a_callable_that_is_no_schedule_is_refused(value, error, message):
    with pytest.raises(error, match=f"^L2Penalty: strength.*{message}"):
        L2Penalty(value)


def test_a_mapping_of_callables_is_probed():
    with pytest.raises(TypeError, match=r"^DropoutScheduler: p/net must be a number, a schedule, or a function"):
        DropoutScheduler({"net": torch.sigmoid})


@pytest.mark.parametrize("callback", [name for name in ROWS if getattr(lightning_reg, name).valid_ranges])
def test_every_callback_calls_a_schedule_function_once(callback):
    cls, seen = getattr(lightning_reg, callback), []

    def recorded(progress):
        seen.append(progress)
        return 0.5

    arguments = {argument.name for argument in arguments_of(cls)} & set(cls.valid_ranges)
    needed = {**as_config(ROWS[callback].active())["init_args"], **NEEDED.get(callback, {})}
    made = cls(**{**needed, **dict.fromkeys(arguments, recorded)})
    assert seen == [0.0] * len(arguments)
    assert {made.current[argument] for argument in arguments} == {0.5}


def test_a_schedule_function_is_called_once_with_zero():
    seen = []

    def recorded(progress):
        seen.append(progress)
        return 0.1 + 0.1 * progress

    callback = L2Penalty(recorded)
    assert seen == [0.0]
    assert callback.current == {"strength": 0.1}
    fit([callback], max_epochs=1)
    assert seen == [0.0, 0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "returned", [np.float32(0.5), np.float64(0.5), np.int64(1), 1], ids=lambda number: type(number).__name__
)
def test_numbers_that_a_schedule_may_return(returned):
    assert same(fit([L2Penalty(lambda progress: returned)], max_epochs=1), fit([L2Penalty(float(returned))], max_epochs=1))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, NameError, RuntimeError])
def test_a_function_that_works_only_in_a_fit_is_accepted(error):
    """It may read what exists only then, or refuse a progress that a resumed fit never has."""

    def later(progress):
        if not progress:
            raise error("not yet")
        return progress

    assert math.isnan(L2Penalty(later).current["strength"])
    with pytest.raises(error, match="not yet"):
        fit([L2Penalty(later)])


def test_an_attribute_that_is_missing_for_now_is_accepted():
    holder = types.SimpleNamespace()
    callback = L2Penalty(lambda progress: holder.scale * progress)
    holder.scale = 0.1
    fit([callback], max_epochs=1)
    assert callback.current == {"strength": pytest.approx(0.075)}
