"""Snippets of the documentation run as they are printed, at the trio's addresses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_docs import PAGES, ROOT, blocks

from .processes import Trio

QUESTION = "What is 7 + 5?"
API_SERVERS = re.compile(r"(?:localhost|127\.0\.0\.1):8888")
STATUS_OF_CURL = "--silent --show-error --fail-with-body"


def snippets(language: str, has: str) -> Iterator[object]:
    for page in PAGES:
        for number, block in enumerate(blocks(page, language)):
            if has in block and API_SERVERS.search(block):
                yield pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")


PYTHON = list(snippets("python", "import"))
SHELL = list(snippets("bash", "curl "))


def test_snippets_are_found() -> None:
    assert len(PYTHON) >= 5
    assert len(SHELL) >= 2


@pytest.mark.parametrize("snippet", PYTHON)
def test_python_prints_an_answer(trio: Trio, snippet: str) -> None:
    for package in re.findall(r"^(?:from|import) (\w+)", snippet, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(at(trio, snippet), "snippet", "exec"), {})
    assert printed.getvalue().strip()
    if QUESTION in snippet:
        assert "12" in printed.getvalue()


@pytest.mark.parametrize("snippet", SHELL)
def test_curl_gets_an_answer(trio: Trio, snippet: str, tmp_path: Path) -> None:
    """Runs only the lines that begin with curl: others install or start something."""
    curls = [line for line in at(trio, snippet).splitlines() if line.startswith("curl ")]
    script = "\n".join(curls).replace("curl ", f"curl {STATUS_OF_CURL} ")
    ran = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=os.environ
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if QUESTION in snippet:
        assert "12" in ran.stdout


def at(trio: Trio, snippet: str) -> str:
    """The snippet with the address of the trio's API server."""
    return API_SERVERS.sub(trio.server.address.partition("://")[2], snippet)
