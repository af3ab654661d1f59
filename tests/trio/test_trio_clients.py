"""The packages of OpenAI, Anthropic and Ollama work through the trio, each in a script of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.clients import FOLDER

from .processes import Trio


@pytest.mark.parametrize("client", ["openai", "anthropic", "ollama"])
def test_a_package_works(trio: Trio, client: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(FOLDER / "scripts" / f"{client}_client.py")],
        env={**os.environ, "FASTSERVE_URL": trio.server.address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
