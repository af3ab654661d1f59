"""Documentation: links, numbers of decisions, metrics, paths in the glossary, commands and flags are right.

`tests/trio/test_trio_docs.py` runs its snippets.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve import dispatch
from fastserve.config import ApiServerConfig, ControllerConfig, LauncherConfig, ShutdownConfig, WorkerConfig
from fastserve.fleet.spec import RayConfig
from fastserve.launching.plan import parse_item
from fastserve.options import build_parser, parse_config
from fastserve.update_weights import UpdateWeightsConfig

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#]+)")
TERM = re.compile(r"^\| ([^|]+) \| ([^|]+) \| `([^`|]+)` \|$", re.MULTILINE)
MAX_TERMS = 30
PACKAGE = ROOT / "fastserve"
ENDS = {"&&", "||", "|", "&", ";", ">", "<", ">>"}
FLAG = re.compile(r"`(--[a-z][a-z0-9-]*)")
CONFIGS: dict[str, type[Any]] = {
    "controller": ControllerConfig,
    "model_worker": WorkerConfig,
    "openai_api_server": ApiServerConfig,
    "launcher": LauncherConfig,
    "shutdown": ShutdownConfig,
    "update_weights": UpdateWeightsConfig,
    "on_ray": RayConfig,
}
CHOICES = {"dispatch_method": dispatch.names()}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page, each line continued by a backslash joined with the next."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_each_decision_has_its_number_and_stands_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(folder.glob("0*.md"))
    titles = {page: page.read_text(encoding="utf-8").partition("\n")[0] for page in pages}
    for number, page in enumerate(pages, start=1):
        assert (page.name[:4], titles[page].split()[:2]) == (f"{number:04}", ["#", f"{number}."])
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((0.*\.md)\)", index) == [page.name for page in pages]


def test_the_check_of_a_gpu_names_tests_that_exist() -> None:
    named = re.findall(r"tests/\S+?\.py", (ROOT / "benchmarks/gpu_check.sh").read_text(encoding="utf-8"))
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_metric_is_described() -> None:
    described = set(
        re.findall(r"`([a-z_]+?)(?:_total)?(?:\{[a-z,]+\})?`", (ROOT / "docs/metrics.md").read_text("utf-8"))
    )
    declared = {
        name
        for path in (ROOT / "fastserve").rglob("metrics.py")
        for name in re.findall(r'"fastserve_(?:controller|gateway|worker)_(\w+)"', path.read_text("utf-8"))
    }
    assert len(declared) > 20
    assert declared <= described


def test_the_glossary_is_short_and_its_paths_exist() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = TERM.findall(page)
    rows = [line for line in page.splitlines() if line.startswith("| ") and line != "| term | meaning | where |"]
    assert len(terms) == len(rows), "each row has a term, its meaning and one path"
    assert 20 <= len(terms) <= MAX_TERMS
    assert len({term for term, _, _ in terms}) == len(terms)
    assert [path for _, _, path in terms if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_glossary_is_linked(page: str) -> None:
    assert "docs/glossary.md" in LINK.findall((ROOT / page).read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each `python -m fastserve.MODULE` of a block."""
    for line in block.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for start, word in enumerate(words):
            if word.startswith("fastserve.") and words[start - 1] == "-m":
                rest = itertools.takewhile(lambda word: word not in ENDS, words[start + 1 :])
                yield word.removeprefix("fastserve."), [word for word in rest if word != "..."]


COMMANDS = [
    pytest.param(module, argv, id=f"{page.name}: {module} {' '.join(argv)}"[:80])
    for page in PAGES
    for block in blocks(page, "bash")
    for module, argv in commands(block)
]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("module", "argv"), COMMANDS)
def test_commands_of_pages_are_understood(module: str, argv: list[str]) -> None:
    assert importlib.util.find_spec(f"fastserve.{module}") is not None
    if module not in CONFIGS:
        return
    choices = {"choices": CHOICES} if module in ("controller", "launcher", "on_ray") else {}
    config = parse_config(CONFIGS[module], argv, module, {}, **choices)  # an unknown flag ends the process
    if module == "launcher":
        assert all(parse_item(item).model for item in config.model_path_address)


@pytest.mark.parametrize("page", ["vllm.md", "langchain_chatchat.md"])
def test_the_flags_on_our_side_of_a_table_exist(page: str) -> None:
    ours = {
        string
        for config in CONFIGS.values()
        for action in build_parser(config, "x", CHOICES if hasattr(config, "dispatch_method") else None)._actions
        for string in action.option_strings
    }
    rows = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    named = [flag for row in rows for flag in FLAG.findall(row)]
    assert len(named) >= 10
    assert [flag for flag in named if flag not in ours] == []


def test_readme_links_to_each_page() -> None:
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    pages = [str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if page not in links] == []


def test_paths_in_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`([a-z_]+/[a-z_/]*(?:\.[a-z]+)?)`", text))
    assert len(paths) > 50
    there = [f"/{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in PACKAGE.rglob("*")]
    missing = [path for path in sorted(paths) if not any(known.endswith(f"/{path}") for known in there)]
    assert [path for path in missing if not (ROOT / path).exists()] == []
