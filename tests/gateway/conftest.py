from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.cluster import Cluster, start_cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with start_cluster() as made:
        yield made
