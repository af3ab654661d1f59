"""semantic-kernel in its own environment."""

from __future__ import annotations

import pytest

from .conftest import RunScript


@pytest.mark.clients
@pytest.mark.timeout(600)
def test_semantic_kernel_works(run_script: RunScript) -> None:
    run_script("semantic_kernel_client.py")
