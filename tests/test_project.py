"""The files about the project agree with each other: supported versions, changelog, citation, checks, documents."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from allnc import __version__
from tests.test_build import build

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
HOOKS: list[dict[str, Any]] = [
    hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
]
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md"))


def by_name(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def pinned(name: str) -> dict[str, str]:
    """ "2.11" for torch==2.11.* in .ci/<name>.txt."""
    lines = [line for line in (ROOT / ".ci" / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    found = by_name(lines)
    return {package: str(found[package].specifier).removeprefix("==").removesuffix(".*") for package in SUPPORTED}


SUPPORTED = ("torch", "triton")
OLDEST, NEWEST = pinned("oldest"), pinned("newest")


def test_lower_bounds_are_the_oldest_versions_tested() -> None:
    needed = by_name(PROJECT["project"]["dependencies"])
    assert {name: str(needed[name].specifier) for name in SUPPORTED} == {n: f">={OLDEST[n]}" for n in SUPPORTED}
    assert str(by_name(PROJECT["build-system"]["requires"])["torch"].specifier) == f">={OLDEST['torch']}"
    assert ".".join(map(str, build.MIN_TORCH)) == OLDEST["torch"]
    no_torch = build.Tools(torch=None, torch_cuda=None, compiler_error=None, nvcc=None)
    assert f"torch >= {OLDEST['torch']} " in build.decide("auto", no_torch).message


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_documents_name_the_versions_tested(document: str) -> None:
    python = PROJECT["project"]["requires-python"].removeprefix(">=")
    torch, triton = (f"{OLDEST[name]} to {NEWEST[name]}" for name in SUPPORTED)
    text = " ".join((ROOT / document).read_text().split())
    assert f"Python {python} or newer, torch {torch} and Triton {triton}" in text
    assert len(re.findall(r"torch \d\S* to \d", text)) == 1, "said once"


def test_the_newest_versions_are_not_older_than_the_oldest() -> None:
    for name in SUPPORTED:
        assert Version(OLDEST[name]) < Version(NEWEST[name])


def test_changelog_has_the_version() -> None:
    """As a released version, or as the one that the unreleased changes will be."""
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", CHANGELOG, flags=re.DOTALL | re.MULTILINE)
    assert unreleased is not None and "\n### " in unreleased.group(1)
    released = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", CHANGELOG, flags=re.MULTILINE)
    assert __version__ in released or f"It will be {__version__}" in unreleased.group(1)


def test_citation_is_of_this_version_and_of_the_readme_s_paper() -> None:
    assert CITATION["version"] == __version__
    assert CITATION["license"] == PROJECT["project"]["license"]
    (paper,) = CITATION["references"]
    entry = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", README, flags=re.MULTILINE))
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    got = {name: str(paper[name]) for name in ("title", "journal", "volume", "year")}
    got |= {"author": authors, "number": str(paper["issue"]), "note": paper["identifiers"][0]["value"]}
    assert got == entry


def test_checks_need_no_network_and_come_with_the_test_extra() -> None:
    tools = by_name(PROJECT["project"]["optional-dependencies"]["test"])
    of_pre_commit_hooks = {"check", "trailing", "end"}  # first words of its commands
    for hook in HOOKS:
        assert hook["language"] == "system", hook["id"]
        command = shlex.split(hook["entry"])[0]
        package = "pre-commit-hooks" if command.split("-")[0] in of_pre_commit_hooks else command
        assert package in tools, f"{hook['id']} runs {command}"
    for judge in ("ruff", "pyright", "clang-format", "cffconvert", "pre-commit-hooks"):
        assert str(tools[judge].specifier).startswith("=="), f"a new {judge} must not turn an unchanged tree red"


def test_ci_runs_the_readme_s_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert len(re.findall(r"^pip install -e ", README, flags=re.MULTILINE)) == 2
    assert "grep -E '^pip install -e ' README.md" in script.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = re.findall(rf"(?<![\w/.-])((?:\.ci|{folders})/[\w./-]*\w)", text)
    assert len(paths) > 10
    examples = {"allnc/recipes/NAME.yaml"}
    missing = [path for path in paths if path not in examples and not (ROOT / path).exists()]
    assert not missing
