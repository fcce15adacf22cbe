"""Package metadata: bounds, extras, pinned versions, and the contents of the source distribution."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import HERE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = HERE.parent
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]
EXTRAS = {extra: list(map(Requirement, listed)) for extra, listed in PROJECT["optional-dependencies"].items()}
DEPENDENCIES = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def pinned(name):
    """Return all versions of each package that a file in ``.ci`` pins."""
    lines = [line for line in (ROOT / ".ci" / name).read_text().splitlines() if not line.startswith("#")]
    versions = {}
    for requirement in map(Requirement, lines):
        (version,) = requirement.specifier
        versions.setdefault(canonicalize_name(requirement.name), set()).add(version.version)
    return versions


def lower_bound(requirement):
    """Return the oldest version that a requirement allows."""
    (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return bound


def test_malicious_releases_are_excluded():
    """See GHSA-w37p-236h-pfx3. The releases before and after them are allowed."""
    allowed = DEPENDENCIES["lightning"].specifier
    assert [version for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.4") if version in allowed] == ["2.6.1", "2.6.4"]


def test_readme_lists_every_extra():
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_documented_extras_exist(page):
    assert set(re.findall(r"(?:\.|\.whl)\[(\w+)\]\"", page.read_text())) <= set(EXTRAS)


def test_required_packages_are_pinned():
    """Except for the ``bench`` extra, which needs torchvision."""
    required = {*DEPENDENCIES, *(requirement.name for extra in EXTRAS.keys() - {"bench"} for requirement in EXTRAS[extra])}
    assert set(map(canonicalize_name, required)) - {PROJECT["name"]} <= set(pinned("constraints.txt"))


def test_pinned_versions_are_allowed():
    versions = pinned("constraints.txt")
    for requirement in [*DEPENDENCIES.values(), *(requirement for listed in EXTRAS.values() for requirement in listed)]:
        assert all(version in requirement.specifier for version in versions.get(canonicalize_name(requirement.name), ()))


def test_oldest_tested_versions_are_lower_bounds():
    required = [*DEPENDENCIES.values(), *EXTRAS["cli"]]
    oldest = {requirement.name: Requirement(f"x=={lower_bound(requirement)}").specifier for requirement in required}
    tested = {name: versions for name, versions in pinned("oldest.txt").items() if name != "pytorch-lightning"}
    assert tested.keys() == oldest.keys()
    for name, versions in tested.items():
        assert all(version in oldest[name] for version in versions), name


def test_zoo_pins_only_what_other_files_do_not():
    """Two versions of a package could not be installed together. Torch must be the one that all other tests use."""
    assert not pinned("zoo.txt").keys() & pinned("constraints.txt").keys()
    assert {"timm", "torchvision", "transformers", "peft"} <= pinned("zoo.txt").keys()


def test_sdist_contains_files_that_tests_read():
    texts = [path.read_text() for path in HERE.rglob("*.py")]
    read = {path for text in texts for path in re.findall(r"\b(?:ROOT|HERE\.parent) / \"([\w.]+)\"", text)}
    assert {"docs", "examples", "README.md", ".ci", ".github"} <= read
    included = CONFIGURATION["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert read - {"pyproject.toml"} <= set(included)  # always included
    assert all((ROOT / name).exists() for name in included)


def test_page_of_the_package_has_no_links_to_files():
    """They would lead nowhere there. The README itself has many, and a picture."""
    page = (ROOT / "README.md").read_text()
    relative = r"\]\((?!https?:|#)"
    assert len(re.findall(relative, page)) > 10
    for substitution in CONFIGURATION["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(substitution["pattern"], substitution["replacement"], page)
    assert not re.findall(relative, page)
    assert "![" not in page
    assert re.findall(r"\]\(https:", page)
    assert re.findall(r"\]\(#", page)


def test_changelog_describes_the_version():
    """It has a date, and nothing waits for another release when the version is tagged."""
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (PROJECT["version"], True) in [(version, bool(date)) for version, date in versions]


def test_tuning_names_the_extra_where_a_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "lightning_reg.tuning", raising=False)
    with pytest.raises(ModuleNotFoundError, match=re.escape('optuna; install the extra: pip install "lightning-reg[tuning]"')):
        importlib.import_module("lightning_reg.tuning")
