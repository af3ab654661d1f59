"""The pins satisfy the declared ranges for both builds of torch, and README installs them."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import COMPAT_MODULES
from tools import dependencies

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def extras() -> list[str]:
    """The extras that README's second command installs, and the other pinned ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [item for extra in dependencies.EXTRAS for item in project["optional-dependencies"][extra]]


def test_pins_are_names_and_versions_alone() -> None:
    """No addresses, hashes and builds: the same file serves every platform and both builds of torch."""
    assert pins()
    for name, pinned in pins().items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert Version(pinned).local is None
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-"))]


@pytest.mark.parametrize("stated", sorted({*dependencies.declared(), *extras()}))
def test_each_dependency_is_pinned_within_its_range(stated: str) -> None:
    requirement = Requirement(stated)
    assert requirement.specifier.contains(pins()[requirement.name.lower()])


def test_the_installed_versions_are_the_pinned_ones_or_another_end_of_the_range() -> None:
    for stated in dependencies.declared():
        requirement = Requirement(stated)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            assert requirement.marker is not None, requirement.name
            continue
        assert requirement.specifier.contains(installed.partition("+")[0]), f"{stated}, not {installed}"


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    dependencies.main(["oldest"])
    printed = {line.name: line for line in map(Requirement, capsys.readouterr().out.splitlines())}
    declared = {item.name: item for item in map(Requirement, dependencies.declared())}
    assert printed.keys() == declared.keys() - {"torch"}
    for name, oldest in printed.items():
        [exactly] = oldest.specifier
        assert exactly.operator == "=="
        assert f">={exactly.version}" in str(declared[name].specifier)
        assert (oldest.extras, str(oldest.marker)) == (declared[name].extras, str(declared[name].marker))


def test_the_modules_that_the_ends_of_the_ranges_are_tested_with_are_there() -> None:
    assert {path.stem for path in (ROOT / "tests").rglob("test_*.py")} >= COMPAT_MODULES


def test_the_commands_of_the_readme_install_the_pins() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        commands = [line for line in lines if line.startswith("python3 -m venv")]
        assert commands
        assert all("pip install -c constraints.txt " in command for command in commands)
