"""The registry keeps the capabilities of workers, and dispatches requests only to workers that offer theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from fastserve import dispatch
from fastserve.control.registry import LOADING_RETRY_AFTER_S, WorkerRegistry
from fastserve.protocol import ASSUMED_CAPABILITIES, WorkerStatus
from tests.control.test_registry import FASTCHAT, Clock, MakeStatus

leases = map(str, itertools.count())


def chosen(registry: WorkerRegistry, capability: str | None, model: str = "m", count: int = 30) -> set[str]:
    """The workers that `count` requests, one at a time, are dispatched to."""
    found = set()
    for lease in itertools.islice(leases, count):
        found.add(registry.acquire(model, lease, (), capability).address)
        registry.release([lease])
    return found


@pytest.mark.parametrize("method", dispatch.names())
def test_only_workers_with_the_capability_are_chosen(
    make_registry: Callable[..., WorkerRegistry], status: MakeStatus, method: str
) -> None:
    registry = make_registry(method)
    registry.heartbeat("both", 0, status(capabilities=["chat", "completions"]))
    registry.heartbeat("texts", 0, status(capabilities=["completions"]))
    registry.heartbeat("vectors", 0, status(capabilities=["embeddings"]))
    assert chosen(registry, "chat") == {"both"}
    assert chosen(registry, "completions") == {"both", "texts"}
    assert chosen(registry, "embeddings") == {"vectors"}
    assert chosen(registry, None) <= {"both", "texts", "vectors"}
    assert registry.acquire("m", "1", ["vectors"], "embeddings").address == ""


def test_those_that_state_nothing_are_taken_to_chat_and_complete(registry: WorkerRegistry) -> None:
    registry.register("w", True, FASTCHAT)
    for capability in ASSUMED_CAPABILITIES:
        assert chosen(registry, capability, count=1) == {"w"}
    refusal = registry.acquire("m", "1", (), "embeddings")
    assert (refusal.address, refusal.known, refusal.capabilities) == ("", True, ["chat", "completions"])


def test_a_missing_capability_is_reported_only_if_it_will_not_come(
    registry: WorkerRegistry, status: MakeStatus, clock: Clock
) -> None:
    """Capabilities of a loading model are unknown, and a worker that left or failed may come back."""
    registry.heartbeat("loading", 0, status(ready=False))
    assert registry.acquire("m", "1", (), "embeddings").retry_after_s == LOADING_RETRY_AFTER_S
    registry.heartbeat("loading", 0, status(capabilities=["embeddings"]))
    # Chat was assumed while it loaded, but it never offered it.
    assert registry.acquire("m", "2", (), "chat").capabilities == ["embeddings"]

    registry.heartbeat("able", 0, status(capabilities=["chat"]))
    registry.report_failure("able")
    assert registry.acquire("m", "3", (), "chat").capabilities is None
    registry.deregister("able")
    gone = registry.acquire("m", "4", (), "chat")
    assert (gone.known, gone.capabilities, gone.retry_after_s) == (True, None, LOADING_RETRY_AFTER_S)
    for _ in range(700):
        clock.now += 1.0
        registry.heartbeat("loading", 0, status(capabilities=["embeddings"]))
    assert registry.acquire("m", "5", (), "chat").capabilities == ["embeddings"]
    assert not registry.acquire("nobody", "6", (), "chat").known


def test_a_worker_that_changes_its_capabilities_is_listed_anew(registry: WorkerRegistry, status: MakeStatus) -> None:
    registry.heartbeat("w", 0, status(capabilities=["chat", "completions"], models=("m", "n")))
    before = registry.table()
    registry.heartbeat("w", 0, status(capabilities=["completions"], models=("m", "n")))
    for model in ("m", "n"):
        assert chosen(registry, "chat", model, 1) == {""}
        assert chosen(registry, "completions", model, 1) == {"w"}
    changes = registry.table_json(before.epoch, before.version)
    assert b'"capabilities":["completions"]' in changes
    registry.heartbeat("w", 0, status(capabilities=["completions"], models=("n",)))
    assert not registry.acquire("m", "1", (), "completions").address
    assert registry.list_models() == ["n"]


def test_no_more_than_half_of_the_able_workers_are_kept_out(registry: WorkerRegistry, status: MakeStatus) -> None:
    """Workers without the capability do not count."""
    registry.heartbeat("able", 0, status(capabilities=["chat"]))
    for number in range(9):
        registry.heartbeat(f"other{number}", 0, status(capabilities=["completions"]))
    for _ in range(10):
        lease = next(leases)
        registry.acquire("m", lease, (), "chat")
        registry.release([lease], failed=[lease])
    assert chosen(registry, "chat", count=3) == {"able"}


def test_capabilities_of_a_message_are_bounded() -> None:
    for wrong in ([], ["x"] * 17, ["Chat"], ["a\nb"], ["x" * 65], [""], [3], "chat", {"chat": 1}, ["cha t"]):
        with pytest.raises(ValueError):
            WorkerStatus.model_validate({"model_names": ["m"], "capabilities": wrong})
    assert WorkerStatus(model_names=["m"], capabilities=["audio.speech"]).offered == ["audio.speech"]
