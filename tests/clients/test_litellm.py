"""litellm in its own environment."""

from __future__ import annotations

import pytest

from .conftest import RunScript


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_litellm_works(run_script: RunScript) -> None:
    run_script("litellm_client.py", requirements="requirements-litellm.txt")
