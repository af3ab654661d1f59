"""Reading adapters from disk while the engine computes. No model."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastserve.engine.adapters.manager import Adapter, AdapterManager, Place
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.settings import AdapterOptions

from .weightless_adapters import WeightlessStore

DEADLINE_S = 10.0


class RecordingStore(WeightlessStore):
    def __init__(self, num_expected: int, num_slots: int = 9) -> None:
        super().__init__(num_slots)
        self.read_paths: list[str] = []
        self._num_expected = num_expected
        self.all_read = threading.Event()

    def read(self, path: str, shape: Any) -> Any:
        self.read_paths.append(path)
        if len(self.read_paths) >= self._num_expected:
            self.all_read.set()
        return super().read(path, shape)


def make_manager(store: RecordingStore, **options: Any) -> AdapterManager:
    modules = tuple((name, name) for name in "abcdefgh")
    return AdapterManager(store, AdapterOptions(modules=modules, **options), BlockPool(8, 4, prefix_cache=False))


def ask_for(manager: AdapterManager, names: str) -> None:
    for name in names:
        adapter = manager.find(name)
        assert adapter is not None
        manager.enter(adapter)


def settle(manager: AdapterManager) -> None:
    """Wait until all has been read that can be."""
    while manager.is_busy:
        manager.wait(DEADLINE_S)
        manager.update()
        manager.check()


def test_adapters_of_several_waiting_requests_are_read_during_one_step_in_their_order() -> None:
    store = RecordingStore(5)
    manager = make_manager(store, max_loras=2, max_cpu_loras=8)
    ask_for(manager, "dbaec")
    # No call of the manager: the engine computes a step.
    assert store.all_read.wait(DEADLINE_S), f"only {store.read_paths} were read"
    settle(manager)
    assert store.read_paths == list("dbaec")
    assert [adapter.name for adapter in manager.arrived] == list("dbaec")
    assert all(manager.prepare(adapter, 0) is Place.READY for adapter in manager.arrived[:2])
    manager.check()


def test_adapters_that_are_being_read_count_as_copies_in_host_memory() -> None:
    store = RecordingStore(3)
    manager = make_manager(store, max_loras=2, max_cpu_loras=3)
    ask_for(manager, "abcdefgh")
    assert store.all_read.wait(DEADLINE_S)
    settle(manager)
    assert store.read_paths == list("abc")
    first = manager.find("a")
    assert first is not None
    manager.leave(first)
    manager.update()
    assert manager.is_busy
    assert first.host is None


def found(manager: AdapterManager, name: str) -> Adapter:
    adapter = manager.find(name)
    assert adapter is not None
    return adapter


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_adapter_is_read_while_its_request_waits_only_with_prefetch(prefetch: bool) -> None:
    store = RecordingStore(1)
    manager = make_manager(store, max_loras=2, max_cpu_loras=8, prefetch=prefetch)
    ask_for(manager, "ab")
    settle(manager)
    assert store.read_paths == (list("ab") if prefetch else [])
    first = found(manager, "a")
    assert manager.prepare(first, 0) is (Place.READY if prefetch else Place.READING)
    settle(manager)
    assert store.read_paths == (list("ab") if prefetch else ["a"]), "without, when a request is next to start"
    assert manager.prepare(first, 0) is Place.READY
    manager.check()


def test_the_least_recently_used_adapter_is_evicted_and_never_one_in_use() -> None:
    store = RecordingStore(3, num_slots=3)  # one of which is for none
    manager = make_manager(store, max_loras=2, max_cpu_loras=8)
    ask_for(manager, "abc")
    settle(manager)
    a, b, c = (found(manager, name) for name in "abc")
    for adapter in (a, b):
        assert manager.prepare(adapter, 0) is Place.READY
        manager.hold(adapter)
    assert manager.prepare(c, 0) is Place.TOO_MANY
    manager.release(b)
    manager.release(a)
    manager.hold(a)
    assert manager.prepare(c, 0) is Place.READY
    assert [adapter.info.location for adapter in (a, b, c)] == ["device", "host", "device"]
    manager.release(a)
    assert manager.prepare(b, 0) is Place.READY
    assert [adapter.info.location for adapter in (a, b, c)] == ["host", "device", "device"]
    assert (manager.stats.loads, manager.stats.evictions) == (4, 2)
    assert [adapter.info.loads for adapter in (a, b, c)] == [1, 2, 1]
    assert store.read_paths == list("abc"), "copies stay in host memory"
    manager.check()
