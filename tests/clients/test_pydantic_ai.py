"""pydantic-ai in its own environment."""

from __future__ import annotations

import pytest

from .conftest import RunScript


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_pydantic_ai_works(run_script: RunScript) -> None:
    run_script("pydantic_ai_client.py")
