"""openai-agents in its own environment."""

from __future__ import annotations

import pytest

from .conftest import RunScript


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_openai_agents_works(run_script: RunScript) -> None:
    run_script("openai_agents_client.py")
