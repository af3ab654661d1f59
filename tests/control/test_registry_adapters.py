"""The registry learns adapters by their digest, and sends requests to workers that hold them in memory."""

from __future__ import annotations

import pytest

from benchmarks.adapter_dispatch import simulate
from fastserve.control.registry import MAX_HOLDER_LEAD, WorkerRegistry
from fastserve.protocol import AdapterEntry
from tests.control.test_registry import MakeStatus

ENTRIES = [AdapterEntry(name=name, root=f"/{name}") for name in ("a", "b")]


def beat(registry: WorkerRegistry, status: MakeStatus, name: str, *leases: str, held: tuple[str, ...] = ()) -> None:
    """As a worker does: the list goes only to a controller that asks for it."""
    made = status(*leases, adapters_digest="00ff", held_adapters=list(held))
    registry.heartbeat(name, len(leases), made)
    if registry.misses_adapters(name):
        registry.heartbeat(name, len(leases), made, ENTRIES)


def test_a_list_of_adapters_is_asked_for_once(registry: WorkerRegistry, status: MakeStatus) -> None:
    made = status(adapters_digest="00ff")
    registry.heartbeat("one", 0, made)
    assert registry.misses_adapters("one")
    registry.heartbeat("one", 0, made, ENTRIES)
    assert not registry.misses_adapters("one")
    registry.heartbeat("two", 0, made)
    assert not registry.misses_adapters("two"), "another worker has the same list"
    registry.heartbeat("two", 0, status(adapters_digest="01"))
    assert registry.misses_adapters("two")
    assert not registry.misses_adapters("unknown")


def test_requests_for_an_adapter_go_to_workers_that_serve_it(registry: WorkerRegistry, status: MakeStatus) -> None:
    beat(registry, status, "with")
    registry.heartbeat("without", 0, status())
    for number, model in enumerate(("a", "m:a", "a", "b")):
        assert registry.acquire(model, str(number)).address == "with"
    for model in ("c", "other:a", "m:c", "m:", ":a"):
        assert not registry.acquire(model, "x").known
    refusal = registry.acquire("a", "y", ["with"])
    assert (refusal.address, refusal.known) == ("", True)
    assert registry.acquire("a", "z", (), "embeddings").capabilities == ["chat", "completions"]


def test_a_holder_is_preferred_unless_it_is_much_busier(registry: WorkerRegistry, status: MakeStatus) -> None:
    beat(registry, status, "holder", held=("a",))
    beat(registry, status, "idle")
    chosen = [registry.acquire("a", str(number)).address for number in range(int(MAX_HOLDER_LEAD) + 2)]
    assert chosen == ["holder"] * (int(MAX_HOLDER_LEAD) + 1) + ["idle"]


def test_adapters_are_listed_with_their_bases_and_leave_with_their_last_worker(
    registry: WorkerRegistry, status: MakeStatus
) -> None:
    beat(registry, status, "one")
    beat(registry, status, "two")
    table = registry.adapters(-1)
    assert table.adapters is not None
    assert [(row.name, row.root, row.parent) for row in table.adapters] == [("a", "/a", "m"), ("b", "/b", "m")]
    assert registry.adapters(table.version).adapters is None
    registry.deregister("one")
    assert registry.acquire("a", "1").address == "two"
    registry.deregister("two")
    assert registry.adapters(-1).adapters == []
    assert not registry.acquire("a", "2").known


@pytest.mark.parametrize("model_comes_first", [True, False])
def test_a_model_wins_over_an_adapter_of_the_same_name(
    registry: WorkerRegistry, status: MakeStatus, caplog: pytest.LogCaptureFixture, model_comes_first: bool
) -> None:
    if model_comes_first:
        registry.heartbeat("model", 0, status(models=("a",)))
    beat(registry, status, "adapter")
    for _ in range(2):
        registry.heartbeat("model", 0, status(models=("a",)))
        beat(registry, status, "adapter")
    assert caplog.text.count("'a' names a model and an adapter") == 1
    assert registry.acquire("a", "1").address == "model"
    assert registry.acquire("m:a", "2").address == "adapter"


def test_the_lead_of_holders_is_between_reading_too_often_and_queueing() -> None:
    none, chosen, large = (
        simulate(lead, utilization=0.85, load_s=0.5, alpha=0.6, num_adapters=200, requests=4000)
        for lead in (0.0, MAX_HOLDER_LEAD, 32.0)
    )
    assert chosen.hit_rate > 1.5 * none.hit_rate
    assert chosen.p99_wait_s < min(none.p99_wait_s, large.p99_wait_s)
