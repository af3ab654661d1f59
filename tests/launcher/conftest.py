"""A sandbox for launches, cleaned up after the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .launching import Sandbox


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    here = Sandbox(tmp_path)
    try:
        yield here
    finally:
        here.clear()
