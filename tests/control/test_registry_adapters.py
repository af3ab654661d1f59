"""The registry learns adapters by their digest, and sends requests to workers that hold them in memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.adapter_dispatch import simulate
from fastserve.control.adapters import AdapterPlaces
from fastserve.control.choice import MAX_HOLDER_LEAD
from fastserve.control.registry import WorkerRegistry
from fastserve.control.speed import WorkerSpeeds
from fastserve.protocol import AdapterEntry, WorkerStatus
from tests.control.conftest import LIMITS
from tests.control.test_registry import MakeStatus

ENTRIES = [AdapterEntry(name=name, root=f"/{name}") for name in ("a", "b")]


def beat(
    registry: WorkerRegistry,
    status: MakeStatus,
    name: str,
    *leases: str,
    held: tuple[str, ...] = (),
    digest: str = "00ff",
    **fields: Any,
) -> None:
    """As a worker does: the list goes only to a controller that asks for it."""
    made = status(*leases, adapters_digest=digest, held_adapters=list(held), **fields)
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


@pytest.mark.parametrize("digests", [["00"] * 4, ["00", "01", "02", "03"], ["00", "00", "00", "01"]])
@pytest.mark.parametrize("dispatch_method", ["lottery", "shortest_queue"])
def test_the_dispatch_policy_chooses_of_the_workers_that_serve_an_adapter(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, dispatch_method: str, digests: list[str]
) -> None:
    """Whether they have the same adapters or each has others."""
    registry = make_registry(dispatch_method)
    for number, digest in enumerate(digests):
        beat(registry, status, f"w{number}", digest=digest, speed=4.0 if number == 0 else 1.0)
    registry.heartbeat("without", 0, status())
    found = Counter(registry.acquire("a", str(number)).address for number in range(700))
    assert found.keys() == {"w0", "w1", "w2", "w3"}
    if dispatch_method == "shortest_queue":
        assert 380 < found["w0"] < 420
        assert max(found[f"w{number}"] for number in (1, 2, 3)) <= min(found[f"w{number}"] for number in (1, 2, 3)) + 1
    elif len(set(digests)) != 2:
        assert 340 < found["w0"] < 460, "weighted by speed, whatever runs there"


@pytest.mark.parametrize("dispatch_method", ["lottery", "shortest_queue"])
def test_the_dispatch_policy_chooses_of_the_holders(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, dispatch_method: str
) -> None:
    registry = make_registry(dispatch_method)
    for number in range(200):
        beat(registry, status, f"w{number}", held=("a",) if number < 100 else ("b",))
    found = []
    for number in range(400):
        found.append(registry.acquire("a", str(number)).address)
        registry.release([str(number)])
    assert {int(address[1:]) < 100 for address in found} == {True}
    assert len(set(found)) > 60, "not always the same of many"


def test_paused_loading_and_failing_holders_get_no_requests_that_others_can_take(
    registry: WorkerRegistry, status: MakeStatus
) -> None:
    beat(registry, status, "paused", held=("a",), paused=True)
    beat(registry, status, "loading", held=("a",), ready=False)
    beat(registry, status, "lost", held=("a",))
    registry.report_failure("lost")
    registry.heartbeat("no longer", 0, status(held_adapters=["a"]))
    beat(registry, status, "good")
    assert {registry.acquire("a", str(number)).address for number in range(20)} == {"good"}
    assert registry.acquire("a", "x", ["good"]).address == "paused"


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from(["", "01", "02"]),
            st.sampled_from([("m",), ("n",), ("m", "alias"), ("alias", "n")]),
            st.lists(st.sampled_from("abc"), max_size=2),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_an_adapters_worker_serves_it(steps: list[tuple[int, str, tuple[str, ...], list[str], bool]]) -> None:
    """After any history of lists, models, held adapters and departures."""
    lists = {"": "", "01": "ab", "02": "b"}
    clock = [0.0]
    registry = WorkerRegistry(
        dispatch_method="shortest_queue",
        heartbeat_expiration_s=90.0,
        limits=LIMITS,
        clock=lambda: clock[0],
        rng=random.Random(0),
    )
    now: dict[str, tuple[tuple[str, ...], str]] = {}
    for number, digest, models, held, leaves in steps:
        name = f"w{number}"
        if leaves:
            registry.deregister(name)
            now.pop(name, None)
            continue
        status = WorkerStatus(
            model_names=list(models), heartbeat_interval_s=1.0, adapters_digest=digest, held_adapters=held
        )
        registry.heartbeat(name, 0, status)
        if registry.misses_adapters(name):
            registry.heartbeat(name, 0, status, [AdapterEntry(name=entry) for entry in lists[digest]])
        now[name] = (models, lists[digest])
    for adapter in "abc":
        serving = {name: models for name, (models, names) in now.items() if adapter in names}
        places = AdapterPlaces(adapter)
        places.models.update(serving.values())
        chosen = registry.acquire(adapter, adapter).address
        assert chosen in serving if len(places.bases) == 1 else chosen == ""
        for base in ("m", "n", "alias"):
            chosen = registry.acquire(f"{base}:{adapter}", base + adapter).address
            of_base = {name for name, models in serving.items() if base in models}
            assert chosen in of_base if of_base else chosen == ""
    table = registry.adapters(-1)
    assert table.adapters is not None
    assert {row.name for row in table.adapters} == {entry for _, names in now.values() for entry in names}


def test_the_name_of_adapters_of_several_models_is_no_name(registry: WorkerRegistry, status: MakeStatus) -> None:
    beat(registry, status, "one", models=("m",))
    beat(registry, status, "other", models=("n",), digest="01")
    assert not registry.acquire("a", "0").known
    assert registry.acquire("m:a", "1").address == "one"
    assert registry.acquire("n:a", "2").address == "other"
    table = registry.adapters(-1)
    assert table.adapters is not None
    assert [(row.name, row.parent) for row in table.adapters] == [("a", "m"), ("a", "n"), ("b", "m"), ("b", "n")]
    registry.deregister("other")
    assert registry.acquire("a", "3").address == "one"


def test_a_model_with_other_names_in_another_order_is_the_same_base(
    registry: WorkerRegistry, status: MakeStatus
) -> None:
    beat(registry, status, "old", models=("m",))
    beat(registry, status, "new", models=("alias", "m"), digest="01")
    assert {registry.acquire("a", str(number)).address for number in range(4)} == {"old", "new"}
    table = registry.adapters(-1)
    assert table.adapters is not None
    assert len(table.adapters) == 2


def test_choosing_for_an_adapter_does_not_look_at_all_workers(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[str] = []
    waited = WorkerSpeeds.speed

    def speed(self: WorkerSpeeds, address: str) -> float:
        looked_at.append(address)
        return waited(self, address)

    counts = []
    for size in (100, 1000):
        registry = make_registry()
        for number in range(size):
            beat(registry, status, f"w{number}", held=("a",))
        with monkeypatch.context() as patch:
            patch.setattr(WorkerSpeeds, "speed", speed)
            del looked_at[:]
            for number in range(10):
                assert registry.acquire("a", str(number)).address
            counts.append(len(looked_at))
    assert counts[1] <= 1.5 * counts[0]


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
