"""instructor in its own environment."""

from __future__ import annotations

import pytest

from .conftest import RunScript


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_instructor_works(run_script: RunScript) -> None:
    run_script("instructor_client.py")
