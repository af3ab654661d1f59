"""A folder to launch in, with everything gone after the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .launching import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    here = Place(tmp_path)
    try:
        yield here
    finally:
        here.clear()
