"""All examples in the README and in ``docs/`` run, all tables are complete, and all links work."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shlex
import sys
from collections import defaultdict
from contextlib import nullcontext

import digits
import pytest
from helpers import Classifier, Gan, Memory, fit
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from processes import HERE, ROOT
from table import ROWS

import lightning_reg
from lightning_reg import DropoutScheduler

GUIDES = sorted((ROOT / "docs").glob("*.md"))
SITE = sorted((ROOT / "docs").glob("*/*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *GUIDES, *SITE]}
README = PAGES["README.md"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
LINKED = {**PAGES, "CHANGELOG.md": CHANGELOG, ".github/CONTRIBUTING.md": CONTRIBUTING}


BLOCK = r"^(?:<!-- needs (\w+) -->\n)?```{}\n(.*?)^```$"
"""A code block, after a comment if it needs a library that the tests do not install."""


def blocks(page, language, needs=""):
    """Return the code blocks of a language on a page, those that need a library if it is given."""
    found = re.findall(BLOCK.format(language), PAGES[page], re.DOTALL | re.MULTILINE)
    return [code for needed, code in found if needed == needs]


def prose(text):
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def rows(page, heading):
    """Return the cells of the table under a heading, without its header."""
    section = re.split(r"^#+ ", PAGES[page].split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


# Code ---------------------------------------------------------------------------------------------------------------

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_YAML = [page for page in PAGES if blocks(page, "yaml")]
COMMANDS = [
    words[1:]
    for page in PAGES
    for block in blocks(page, "bash")
    for words in (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    if words and words[0] == ".venv/bin/python" and words[1].startswith("examples/")
]
BARE = {words[0] for words in COMMANDS if len(words) == 1}
WITH_FLAGS = [words for words in COMMANDS if len(words) > 1 and words[0] == "examples/digits.py"]
OTHERS = [words for words in COMMANDS if len(words) > 1 and words not in WITH_FLAGS]
SHORT = ["--trainer.max_epochs=1", "--trainer.default_root_dir=."]


@pytest.fixture
def _scratch(tmp_path, monkeypatch):
    """Work in an empty folder, and undo what an example registers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    registries = [lightning_reg.DROPOUT_ATTRIBUTES, lightning_reg.WEIGHT_LAYERS]
    registered = list(map(dict, registries))
    yield
    for registry, entries in zip(registries, registered, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval", "ignore:LightningCLI's args", "ignore:No seed found")
@pytest.mark.usefixtures("_scratch")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=WITH_PYTHON)
def test_python_examples_run(page, capsys):
    """In order, in one namespace. On the page about the command line, comments after ``print(…)`` are what it prints."""
    namespace = {"__name__": "documentation"}
    for code in blocks(page, "python"):
        capsys.readouterr()
        exec(compile(code, page, "exec"), namespace)
        shown = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
        assert page != "docs/command-line.md" or capsys.readouterr().out.splitlines() == shown


NEEDING = [
    (page, needed, code)
    for page, text in PAGES.items()
    for needed, code in re.findall(BLOCK.format("python"), text, re.DOTALL | re.MULTILINE)
    if needed
]


@pytest.mark.parametrize(("page", "needed", "code"), NEEDING, ids=[f"{needed}-{n}" for n, (_, needed, _) in enumerate(NEEDING)])
def test_examples_with_other_libraries_are_valid(page, needed, code):
    """They compile, import the library that they need, and make callbacks with arguments that these accept."""
    tree = ast.parse(code, page)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name for node in imports for name in ([node.module] if isinstance(node, ast.ImportFrom) else named(node))}
    assert needed in {module.split(".")[0] for module in modules}
    ours = {name for node in imports if getattr(node, "module", "") == "lightning_reg" for name in named(node)}
    assert ours <= set(lightning_reg.__all__)
    classes = {name for name in ours if inspect.isclass(getattr(lightning_reg, name))}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = [eval(ast.unparse(node), vars(lightning_reg)) for node in calls if node.func.id in classes]
    assert any(isinstance(callback, Callback) for callback in made)


def named(node):
    return [alias.name for alias in node.names]


def test_examples_with_other_libraries_are_found():
    needed = {needed for _, needed, _ in NEEDING}
    assert needed == {"neuralforecast", "darts", "pytorch_forecasting", "chemprop", "scvi", "keras", "composer", "timm"}
    assert len(NEEDING) == sum(text.count("<!-- needs ") for text in PAGES.values())


@pytest.fixture
def run(_scratch, monkeypatch):
    """Return a function that runs a script in this process, which is much faster than a new process."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit, match=r"^0$") if "help" in " ".join(flags) else nullcontext():
            runpy.run_path(script, run_name="__main__")

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", WITH_FLAGS, ids=list(map(" ".join, WITH_FLAGS)))
def test_commands_run(words, run, tmp_path, monkeypatch):
    functions = [code for code in blocks("docs/command-line.md", "python") if code.startswith("def ")]
    (tmp_path / "choices.py").write_text("\n".join(functions))
    monkeypatch.syspath_prepend(tmp_path)
    script, *flags = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    short = [] if "help" in " ".join(flags) else SHORT
    run(script, *flags, *short)


@pytest.mark.filterwarnings("ignore")
def test_command_with_unknown_flag_fails(run):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(str(ROOT / "examples" / "digits.py"), "fit", "--trainer.callbacks+=L2Penalty", "--trainer.callbacks.weight=1")


def test_scripts_without_flags_are_tested():
    tested = "".join(path.read_text() for path in HERE.glob("test_example*.py"))
    assert all(script.removeprefix("examples/") in tested for script in BARE)


def test_flags_of_other_scripts_are_tested():
    """In the script's own test file."""
    for script, *flags in OTHERS:
        tested = (HERE / f"test_example_{script.removeprefix('examples/')}").read_text()
        assert [flag for flag in flags if f'"{flag}"' not in tested] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_YAML, ids=WITH_YAML)
def test_yaml_examples_run(page, run, tmp_path):
    for number, text in enumerate(blocks(page, "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        flags = ["fit", "--config", f"{number}.yaml", *SHORT]
        run(str(ROOT / "examples" / "digits.py"), *flags)


@pytest.mark.filterwarnings("ignore")
def test_several_files_are_merged(tmp_path, monkeypatch):
    """The command that the page shows, with its first two files."""
    shown = next(code for code in blocks("docs/command-line.md", "text") if code.startswith("python train.py"))
    for name, text in zip(("fit.yaml", "more.yaml"), blocks("docs/command-line.md", "yaml"), strict=False):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(digits.DigitsClassifier, digits.Digits, args=shlex.split(shown)[3:], run=False)
    ours = [callback for callback in cli.trainer.callbacks if type(callback).__module__.startswith("lightning_reg")]
    assert [callback.name for callback in ours] == [
        "L2Penalty",
        "DropoutInjection-ReLU",
        "GradientNormClipping",
        "MaxNorm",
        "second",
    ]
    assert ours[-1].strength == 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_scratch")
def test_short_errors_are_those_of_the_example(monkeypatch, capsys):
    """The page shows the lines of ``examples/digits.py``, and what they print."""
    code = next(code for code in blocks("docs/command-line.md", "python") if "class BriefCLI" in code)
    lines = {line.strip() for line in code.split("try:")[1].splitlines()}
    assert lines <= {line.partition("  # ")[0].strip() for line in inspect.getsource(digits).splitlines()}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["digits.py", "fit", "--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=-1"])
    with pytest.raises(SystemExit, match=r"^2$"):
        digits.main()
    shown = next(text for text in blocks("docs/command-line.md", "text") if text.startswith("usage: "))
    printed = capsys.readouterr().err.partition("usage: ")[2].splitlines()
    assert printed[-1] == shown.splitlines()[-1]
    assert len(printed) == len(shown.splitlines()) == 3  # the other two depend on the version of jsonargparse
    monkeypatch.setattr(sys, "argv", ["digits.py", "fit", "--trainer.callbacks+=L1Penalty", "--trainer.callbacks.strength=x"])
    with pytest.raises(SystemExit, match=r"^2$"):
        digits.main()
    first, *others = capsys.readouterr().err.partition("usage: ")[2].splitlines()[:3]
    assert first == "digits.py [options] fit [--config FILE] [--help] [options]"
    assert any(line.startswith("error: ") for line in others)


@pytest.mark.filterwarnings("ignore")
def test_errors_of_the_model_keep_their_traceback():
    class Broken(digits.DigitsClassifier):
        def __init__(self):
            raise ValueError("in the model")

    with pytest.raises(ValueError, match=r"^in the model$"):
        digits.BriefCLI(Broken, digits.Digits, args=[], run=False)


def test_examples_are_found():
    """The patterns above match."""
    assert {"README.md", "docs/dropout.md", "docs/other-libraries.md", "docs/pruning.md", "docs/custom.md"} <= set(WITH_PYTHON)
    assert WITH_YAML == ["docs/command-line.md"]
    files = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert files == BARE  # each has its command on some page
    assert len(WITH_FLAGS) > 2
    assert ["examples/language_transformer.py", "--fsdp"] in OTHERS


# The README ---------------------------------------------------------------------------------------------------------


def cells(text):
    """Return the cells of the printed summary, regardless of column widths."""
    table = text.split("Regularization\n", 1)[-1].split("└", 1)[0]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in table.splitlines() if line[:1] in ("│", "┃")]


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.usefixtures("_scratch")
def test_summary_in_readme_matches_output(capsys):
    exec(compile(blocks("README.md", "python")[0], "README.md", "exec"), {"__name__": "documentation"})
    printed = re.sub(r"Regularization +\n", "Regularization\n", capsys.readouterr().out)
    assert cells(README) == cells(printed)
    assert len(cells(README)) == 4


def test_readme_is_short():
    lines = [line for line in prose(README).splitlines() if not line.startswith("|")]
    assert sum(len(line.split()) for line in lines) <= 1200


def test_readme_lists_every_callback():
    listed = [name for _, callbacks, _ in rows("README.md", "## All techniques") for name in re.findall(r"`(\w+)`", callbacks)]
    assert set(listed) == {*ROWS, "Penalty"}
    assert len(listed) == len(set(listed))


def test_every_callback_has_a_card():
    """Its picture is tested in ``test_cards.py``."""
    written = {path.stem for path in SITE if path.parent.name == "cards"} - {"index"}
    assert {*ROWS, "Penalty"} - written == set(), "write docs/cards/NAME.md, with the sections of the others"
    assert written == {*ROWS, "Penalty"}


def test_techniques_page_has_every_formula():
    """The first cells of its tables are calls."""
    calls = [
        row[0]
        for heading in re.findall(r"^## .*$", PAGES["docs/techniques.md"], re.MULTILINE)
        for row in rows("docs/techniques.md", heading)
    ]
    listed = {name for cell in calls for name in re.findall(r"^`(\w+)", cell)}
    assert {*ROWS, "Penalty"} - {"WeightPruning"} <= listed


def test_changelog_lists_every_callback():
    assert set(ROWS) - set(re.findall(r"`(\w+)`", CHANGELOG)) == set()


def test_suggested_calls_are_valid():
    """Each call creates a callback."""
    table = rows("README.md", "## Which technique should I use?")
    calls = [call for _, _, values in table for call in re.findall(r"`(.+?)`", values)]
    assert all(isinstance(eval(call, vars(lightning_reg)), Callback) for call in calls)
    assert len(calls) > 20


def test_readme_names_the_wheel():
    assert f"lightning_reg-{lightning_reg.__version__}-py3-none-any.whl" in README


def test_ci_runs_test_command_of_readme():
    """CI takes the command from the README, so that the two cannot differ."""
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()
    (commands,) = re.findall(r"<!-- test command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands.endswith(".venv/bin/python -m pytest")
    assert commands.count("\n") == 0


def versions(name):
    """Return the pinned version of each package in a file in ``.ci``."""
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / ".ci" / name).read_text(), re.MULTILINE))


def test_documented_libraries_match_tested_ones():
    """In their versions, and with the models that ``tests/zoo/models.py`` names."""
    table = rows("docs/guarantees.md", "## Models of other libraries")
    pinned = {**versions("constraints.txt"), **versions("zoo.txt")}
    documented = {library.strip("`"): version for library, version, _ in table}
    assert documented == {library: pinned[library] for library in documented}
    assert set(versions("zoo.txt")) & {"timm", "transformers", "peft"} <= set(documented)
    models = [f"{library.strip('`')} {name}" for library, _, names in table for name in names.split(", ")]
    listed = re.findall(r'^    "([\w-]+ [\w-]+)": Model\(', (HERE / "zoo" / "models.py").read_text(), re.MULTILINE)
    assert [re.sub(r" \(.*", "", model) for model in models] == listed


# Metrics ------------------------------------------------------------------------------------------------------------


def logged_keys(callback, model):
    """Return the keys that a callback logs in a short fit, without their prefix."""
    logger, prefix = Memory(), f"reg/{callback.name}/"
    fit([callback], model, max_epochs=1, logger=logger, log_every_n_steps=1)
    logged = {key for metrics in logger.steps.values() for key in metrics if key.startswith("reg/")}
    assert all(key.startswith(prefix) for key in logged)
    if isinstance(callback, lightning_reg.ParameterMonitor):
        return {f"<parameter>/{key.rpartition('/')[2]}" for key in logged}
    return {re.sub("^p/.*", "p/<pattern>", key.removeprefix(prefix)) for key in logged}


def documented_keys(column):
    """Return the callbacks that log each documented key, and the key's entry in another column."""
    headings = ("### Current values", "### Penalties", "### Gradients", "### Weights", "### Dropout", "### Watching")
    table = [row for heading in headings for row in rows("docs/metrics.md", heading)]
    return {re.findall("`(.+?)`", row[0])[0]: (set(re.findall(r"`(\w+)`", row[1])), row[column]) for row in table}


def differences(documented, logged):
    """Return the callbacks of each key that is documented but not logged, or logged but not documented."""
    pairs = [("documented, not logged", documented, logged), ("logged, not documented", logged, documented)]
    named = {(what, key): names - right.get(key, set()) for what, left, right in pairs for key, names in left.items()}
    return {key: names for key, names in named.items() if names}


def test_documented_metrics_match_logged_metrics():
    logged = defaultdict(set)
    for name, row in ROWS.items():
        for callback in filter(None, (row.active(), row.scheduled and row.scheduled())):
            for key in logged_keys(callback, Classifier(**row.options)):
                logged[key].add(name)
    for key in logged_keys(DropoutScheduler({"net.3": 0.2}), Classifier()):
        logged[key].add("DropoutScheduler")
    logged["<penalty>/relative_norm"].add("ParameterMonitor")  # see test_parameter_monitor.py
    assert differences({key: callbacks for key, (callbacks, _) in documented_keys(3).items()}, logged) == {}


def test_documented_metrics_of_several_optimizers():
    logged = defaultdict(set)
    for name, row in ROWS.items():
        if "several_optimizers" not in row.exempt:
            for key in logged_keys(row.active(), Gan(**row.options)):
                logged[key].add(name)
    expected = defaultdict(set)
    for key, (callbacks, number) in documented_keys(3).items():
        for name in callbacks - {"ActivityPenalty"}:
            for suffix in ("_0", "_1") if number == "per optimizer" else ("",):
                expected[key + suffix].add(name)
    del expected["p/<pattern>"], expected["<penalty>/relative_norm_0"], expected["<penalty>/relative_norm_1"]
    assert differences(expected, logged) == {}


# Links --------------------------------------------------------------------------------------------------------------


def anchors(text):
    """Return the anchors that GitHub creates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (page, target)
    for page, text in LINKED.items()
    for target in re.findall(r"\[(?:[^\[\]]|!\[[^\]]*\])*\]\(([^)\s]+)\)", prose(text))
    if not target.startswith(("http://", "https://"))
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page} to {target}" for page, target in LINKS])
def test_links_work(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    assert not anchor or anchor in anchors(file.read_text())


def test_every_guide_is_linked():
    guides = {path.name for path in GUIDES} - {"index.md"}
    linked = {target.partition("#")[0] for page, target in LINKS if page == "docs/index.md"}
    index = re.findall(r"^```{toctree}\n(.*?)^```", PAGES["docs/index.md"], re.DOTALL | re.MULTILINE)
    assert guides <= {f"{page}.md" for tree in index for page in tree.split()}
    assert linked >= guides | {f"pages/{path.name}" for path in SITE if path.parent.name == "pages"} | {"cards/index.md"}
    assert {f"docs/{name}" for name in guides} <= {target.partition("#")[0] for page, target in LINKS if page == "README.md"}


def test_files_named_in_text_exist():
    paths = r"`((?:\.github|docs|examples|lightning_reg|tests)/[\w/.]+)`"
    named = {name for text in [*PAGES.values(), CONTRIBUTING] for name in re.findall(paths, text)}
    assert "tests/table.py" in named
    assert not [name for name in named if not (ROOT / name).exists()]
