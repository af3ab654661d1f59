"""Attacks on a running trio: good clients lose nothing, and no service grows.

What the clients notice of an attack in time is measured by `python -m benchmarks.attacks`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from benchmarks.attacks import ATTACKS, NUM_GOOD_CLIENTS, Attacker, Target, attacked, running_trio

SHORT_S = 1.5
DEFAULT = frozenset(
    {
        *("heartbeats-with-senseless-numbers", "lists-full-of-errors", "prompts-far-over-the-context", "nested-json"),
        *("endless-headers", "connections-that-never-finish", "strangers"),
        *("a-worker-that-answers-500", "a-worker-with-an-endless-line"),
    }
)
"""Attacks of the default run; the others are slow tests."""
LONG_S = 20.0
MAX_GROWTH_MB = 300.0
MAX_LATENCY_S = 15.0
"""Seconds: far above the time of a request on a busy machine, so that a dead service is noticed."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running_trio(tmp_path_factory.mktemp("attacked")) as running:
        yield running


@pytest.fixture(scope="module")
def attacker(target: Target) -> Iterator[Attacker]:
    with Attacker(target) as process:
        yield process


@pytest.mark.parametrize(
    "seconds",
    [SHORT_S, pytest.param(LONG_S, marks=[pytest.mark.slow, pytest.mark.timeout(300)])],
    ids=["short", "long"],
)
@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ATTACKS)]
)
async def test_good_clients_lose_nothing_and_memory_stays(
    target: Target, attacker: Attacker, name: str, seconds: float
) -> None:
    seen, grown_mb, _ = await attacked(target, attacker, name, seconds)
    assert len(seen.latencies_s) >= NUM_GOOD_CLIENTS
    assert not seen.lost, seen.lost[:2]
    assert max(seen.latencies_s) < MAX_LATENCY_S
    assert grown_mb < MAX_GROWTH_MB
    await serves_as_before(target)


async def serves_as_before(target: Target) -> None:
    """Check that API server and controller are ready, and that the table has the remaining worker."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
        for address in (target.controller, target.worker, target.server):
            async with http.get(address + "/health") as response:
                assert response.status == 200
        async with asyncio.timeout(15):
            while True:
                async with http.get(target.controller + "/workers", headers=target.member) as response:
                    table = await response.json()
                if [row["address"] for row in table["workers"]] == [target.worker]:
                    return
                await asyncio.sleep(0.1)
