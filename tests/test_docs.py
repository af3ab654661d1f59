"""Documentation: links, numbers of decisions, metrics, and paths in the glossary are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s#]+)")
TERM = re.compile(r"^\| ([^|]+) \| ([^|]+) \| `([^`|]+)` \|$", re.MULTILINE)
MAX_TERMS = 30


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
