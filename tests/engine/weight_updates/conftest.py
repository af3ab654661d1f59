from __future__ import annotations

from collections.abc import Iterator

import pytest

from .trainer_process import Trainer


@pytest.fixture(scope="package")
def trainer() -> Iterator[Trainer]:
    """Takes seconds to start, so all tests share one."""
    running = Trainer()
    yield running
    running.end()
