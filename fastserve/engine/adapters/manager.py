"""Which adapters there are, and in which memory: device, host or disk. No tensors here.

An adapter takes blocks of the same pool as the KV cache while it is on the device. It is held there by the running
requests that use it; when nobody does, it is idle, and gives its blocks back when they are needed, least recently used
first. A thread reads adapters of waiting requests from disk, one after the other in the order in which they were asked
for, also while a step runs; a step never waits for it. Copies in host memory are bounded, and given up least recently
used first, but those that a request needs.

An adapter that is replaced or unloaded stays until its last request is done. Each one that is loaded has a number of
its own, which is part of the root of its prefix cache: so keys and values of another one of the same name are never
found.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from fastserve.engine.contract import AdapterInfo, AdapterStats
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.settings import AdapterOptions
from fastserve.errors import (
    ConflictError,
    FastserveError,
    InternalError,
    ModelNotFoundError,
    OverloadedError,
    StartupError,
)
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

MAX_ADAPTERS = 1 << 16
"""Adapters that an engine knows, at most."""
MAX_PENDING_LOADS = 64
_MAX_READS = 8
"""Adapters that the thread is given at once, so that it need not wait for the end of a step before the next one."""
_SHOWN_CHARS = 80
_SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Rank, target modules and sizes of an adapter, from its configuration and file headers."""

    rank: int
    targets: tuple[str, ...]
    num_bytes: int
    num_blocks: int
    """Blocks that it takes on the device."""
    stamp: tuple[int, ...] = ()
    """Changes with the adapter's files."""


class AdapterStore(Protocol):
    """Reads adapters, and holds those on the device. Copies in host memory are `Any`: no tensors here."""

    @property
    def num_slots(self) -> int:
        """Maximum number of adapters on the device."""
        ...

    def begin_reading(self) -> None:
        """Called once by the thread that will read."""
        ...

    def inspect(self, path: str) -> AdapterShape:
        """Read an adapter's shapes. Raises InvalidRequestError. Any thread may call it."""
        ...

    def read(self, path: str, shape: AdapterShape) -> Any:
        """A copy of an adapter in host memory. Raises InvalidRequestError, also when its files are not those that
        `shape` was read from. Any thread may call it."""
        ...

    def place(self, slot: int, host: Any, block_ids: list[int]) -> None:
        """Copy an adapter to the device."""
        ...

    def clear(self, slot: int) -> None: ...


class Place(Enum):
    """The result of `AdapterManager.prepare`."""

    READY = "on the device"
    READING = "it is being read"
    TOO_MANY = "the step has as many different adapters as it may"
    NO_BLOCKS = "there are no blocks for it"


@dataclass(slots=True, eq=False)
class Adapter:
    name: str
    path: str
    number: int
    """Never used again."""
    shape: AdapterShape
    host: Any = None
    slot: int = 0
    """0: not on the device."""
    block_ids: list[int] = field(default_factory=list)
    num_running: int = 0
    """Running requests; they hold it on the device."""
    num_users: int = 0
    """Running and waiting requests."""
    hits: int = 0
    loads: int = 0
    is_retired: bool = False
    """It was replaced or is being unloaded: no new request gets it."""

    @property
    def info(self) -> AdapterInfo:
        shape = self.shape
        return AdapterInfo(
            self.name, self.path, shape.rank, shape.targets, shape.num_bytes,
            "device" if self.slot else "disk" if self.host is None else "host",
            self.num_running, self.hits, self.loads,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Load:
    """A call that loads an adapter."""

    name: str
    path: str
    replace: bool
    reply: Future[AdapterInfo]


class AdapterManager:
    """Called by the engine's thread alone."""

    def __init__(self, store: AdapterStore, options: AdapterOptions, pool: BlockPool) -> None:
        """Raises InvalidRequestError for an adapter of the options that cannot be served, StartupError for options that
        exclude each other."""
        if options.max_cpu_loras < options.max_loras:
            raise StartupError(
                f"--max-cpu-loras is {options.max_cpu_loras}, and --max-loras {options.max_loras}: each adapter of a "
                "step has a copy in host memory too, so raise the former or lower the latter."
            )
        self._store = store
        self._options = options
        self._pool = pool
        self._by_name: dict[str, Adapter] = {}
        self._next_number = 1
        self._free_slots = list(range(store.num_slots - 1, 0, -1))
        self.loads = 0
        self.evictions = 0
        self._on_device: OrderedDict[Adapter, None] = OrderedDict()
        """Least recently used first."""
        self._on_host: OrderedDict[Adapter, None] = OrderedDict()
        self._num_distinct = 0
        """Adapters with running requests."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters", initializer=store.begin_reading)
        self._asked_for: OrderedDict[Adapter, None] = OrderedDict()
        """Adapters to be read, in order."""
        self._reading: OrderedDict[Adapter, Future[Any]] = OrderedDict()
        """Adapters that the thread reads, in order."""
        self._loads: list[tuple[_Load, Future[tuple[AdapterShape, Any]]]] = []
        self._unloads: list[tuple[Adapter, Future[AdapterInfo]]] = []
        self._unloading: set[str] = set()
        self.arrived: list[Adapter] = []
        """Adapters that have been read since the scheduler looked."""
        self.failed: list[tuple[Adapter, str]] = []
        """Adapters that could not be read, and why."""
        for name, path in options.modules:
            self._register(name, path, store.inspect(path))

    # ---- names --------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Adapter | None:
        return self._by_name.get(name)

    def problem(self, name: str) -> str | None:
        """The reason why no request can use this adapter, or None."""
        if name in self._by_name:
            return None
        shown = printable(name, _SHOWN_CHARS)
        if name in self._unloading:
            return f"The adapter {shown} is being unloaded."
        known = sorted(self._by_name)
        names = ", ".join(known[:_SHOWN_NAMES]) or "none"
        more = f" and {len(known) - _SHOWN_NAMES} more" if len(known) > _SHOWN_NAMES else ""
        return f"There is no adapter {shown}; there are: {names}{more}."

    def infos(self) -> list[AdapterInfo]:
        return [adapter.info for adapter in self._by_name.values()]

    def load(self, name: str, path: str, *, replace: bool) -> Future[AdapterInfo]:
        """Read an adapter and register it. The future raises ConflictError or InvalidRequestError."""
        self._require_free(name, replace=replace)
        if len(self._loads) >= MAX_PENDING_LOADS:
            raise OverloadedError(f"{MAX_PENDING_LOADS} adapters are being loaded already; try again later.")
        load = _Load(name, path, replace, Future())
        self._loads.append((load, self._thread.submit(self._inspect_and_read, path)))
        return load.reply

    def unload(self, name: str) -> Future[AdapterInfo]:
        """Retire an adapter; the future is done when its last request is. Raises ModelNotFoundError."""
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise ModelNotFoundError(self.problem(name) or "")
        adapter.is_retired = True
        done: Future[AdapterInfo] = Future()
        self._unloads.append((adapter, done))
        self._unloading.add(name)
        self.update()
        return done

    def _inspect_and_read(self, path: str) -> tuple[AdapterShape, Any]:
        shape = self._store.inspect(path)
        return shape, self._store.read(path, shape)

    def _require_free(self, name: str, *, replace: bool) -> None:
        if name in self._by_name:
            if not replace:
                raise ConflictError(
                    f"There is an adapter {printable(name, _SHOWN_CHARS)} already; unload it first, or replace it."
                )
        elif len(self._by_name) >= MAX_ADAPTERS:
            raise ConflictError(f"There are {MAX_ADAPTERS} adapters already; unload one first.")

    def _register(self, name: str, path: str, shape: AdapterShape) -> Adapter:
        old = self._by_name.get(name)
        if old is not None:
            old.is_retired = True
            self._drop_if_done(old)
        adapter = self._by_name[name] = Adapter(name, path, self._next_number, shape)
        self._next_number += 1
        return adapter

    # ---- requests -----------------------------------------------------------------------------------------------

    def enter(self, adapter: Adapter) -> None:
        """A request for the adapter waits."""
        adapter.num_users += 1
        if self._options.prefetch:
            self._ask_for(adapter)

    def leave(self, adapter: Adapter) -> None:
        """A request has ended."""
        adapter.num_users -= 1
        self._drop_if_done(adapter)

    def hold(self, adapter: Adapter) -> None:
        """A request for the adapter runs, which is on the device."""
        self._num_distinct += adapter.num_running == 0
        adapter.num_running += 1
        self._on_device.move_to_end(adapter)

    def release(self, adapter: Adapter) -> None:
        """A running request has ended or was preempted."""
        adapter.num_running -= 1
        self._num_distinct -= adapter.num_running == 0

    def prepare(self, adapter: Adapter, num_reserved: int) -> Place:
        """Put an adapter on the device for a request, if it is not there; leave `num_reserved` blocks free."""
        if not adapter.num_running and self.has_max_distinct:
            return Place.TOO_MANY
        if adapter.slot:
            return Place.READY
        if adapter.host is None:
            self._ask_for(adapter)
            return Place.READING
        needed = adapter.shape.num_blocks
        while self._pool.num_free - needed < num_reserved or not self._free_slots:
            if not self.evict_idle(is_needed=not num_reserved):
                return Place.NO_BLOCKS
        adapter.slot = self._free_slots.pop()
        adapter.block_ids = self._pool.allocate(needed)
        self._store.place(adapter.slot, adapter.host, adapter.block_ids)
        adapter.loads += 1
        self.loads += 1
        self._on_device[adapter] = None
        self._on_host.move_to_end(adapter)
        self._start_reading()
        return Place.READY

    @property
    def has_max_distinct(self) -> bool:
        """Whether running requests have as many different adapters as they may."""
        return self._num_distinct >= self._options.max_loras

    @property
    def is_prefetching(self) -> bool:
        return self._options.prefetch

    def evict_idle(self, but: Adapter | None = None, *, is_needed: bool = False) -> bool:
        """Free the blocks of the least recently used adapter that no request holds; False if there is none.
        `is_needed`: nothing can run without, so this is done with --no-lora-swap too."""
        if self._options.no_lora_swap and not is_needed:
            return False
        for adapter in self._on_device:
            if not adapter.num_running and adapter is not but:
                self._evict(adapter)
                self.evictions += 1
                return True
        return False

    def _evict(self, adapter: Adapter) -> None:
        del self._on_device[adapter]
        self._store.clear(adapter.slot)
        self._free_slots.append(adapter.slot)
        self._pool.free(adapter.block_ids)
        adapter.slot, adapter.block_ids = 0, []

    def _drop_if_done(self, adapter: Adapter) -> None:
        """Give up all memory of an adapter that nobody can use any more."""
        if not adapter.is_retired or adapter.num_users:
            return
        if adapter.slot:
            self._evict(adapter)
        self._asked_for.pop(adapter, None)
        self._on_host.pop(adapter, None)
        adapter.host = None
        self._pool.drop_roots([root_of(adapter, is_long=is_long) for is_long in (False, True)])

    # ---- reading ------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether something is being read."""
        return bool(self._reading or self._loads)

    def wait(self, timeout_s: float) -> None:
        """Wait until something has been read."""
        pending: list[Future[Any]] = [future for _, future in self._loads]
        pending += self._reading.values()
        wait(pending, timeout_s, return_when="FIRST_COMPLETED")

    def update(self) -> None:
        """Take what has been read, and complete calls. Called between two steps."""
        for adapter in [one for one, future in self._reading.items() if future.done()]:
            self._take(adapter, self._reading.pop(adapter))
        if self._loads:
            done = [item for item in self._loads if item[1].done()]
            self._loads = [item for item in self._loads if item not in done]
            for load, future in done:
                self._finish_load(load, future)
        if self._unloads:
            ended = [item for item in self._unloads if not item[0].num_users]
            self._unloads = [item for item in self._unloads if item[0].num_users]
            for adapter, reply in ended:
                self._drop_if_done(adapter)
                self._unloading.discard(adapter.name)
                reply.set_result(adapter.info)
        self._start_reading()

    def _ask_for(self, adapter: Adapter) -> None:
        if adapter.slot or adapter.host is not None or adapter in self._reading or adapter in self._asked_for:
            return
        self._asked_for[adapter] = None
        self._start_reading()

    def _start_reading(self) -> None:
        while self._asked_for and len(self._reading) < _MAX_READS and self._make_room_on_host():
            adapter, _ = self._asked_for.popitem(last=False)
            self._reading[adapter] = self._thread.submit(self._store.read, adapter.path, adapter.shape)

    def _make_room_on_host(self) -> bool:
        """Give up copies until one more may be read; False if requests need them all. A request keeps its adapter's
        copy until its end, or a preempted one might wait for room that others hold."""
        while len(self._on_host) + len(self._reading) >= self._options.max_cpu_loras:
            found = next((one for one in self._on_host if not one.num_users), None)
            if found is None:
                return False
            del self._on_host[found]
            found.host = None
        return True

    def _take(self, adapter: Adapter, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            message = error.message if isinstance(error, FastserveError) else f"{type(error).__name__}: {error}"
            logger.warning("The adapter %s cannot be read: %s", adapter.name, message)
            self.failed.append((adapter, message))
        elif not adapter.is_retired or adapter.num_users:
            self._keep(adapter, future.result())

    def _keep(self, adapter: Adapter, host: Any) -> None:
        adapter.host = host
        self._on_host[adapter] = None
        self.arrived.append(adapter)

    def _finish_load(self, load: _Load, future: Future[tuple[AdapterShape, Any]]) -> None:
        try:
            self._require_free(load.name, replace=load.replace)
            shape, host = future.result()
        except FastserveError as error:
            load.reply.set_exception(error)
            return
        except Exception as error:
            logger.exception("an adapter could not be read")
            load.reply.set_exception(InternalError(f"The adapter could not be read ({type(error).__name__}: {error})."))
            return
        adapter = self._register(load.name, load.path, shape)
        if self._make_room_on_host():
            self._keep(adapter, host)
        load.reply.set_result(adapter.info)

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Raise RuntimeError when the state is inconsistent. For tests."""
        slots = [adapter.slot for adapter in self._on_device]
        if 0 in slots or len({*slots, *self._free_slots}) != self._store.num_slots - 1:
            raise RuntimeError("slots are lost or used twice")
        if self._num_distinct != sum(1 for adapter in self._on_device if adapter.num_running):
            raise RuntimeError("a running request's adapter is not on the device")
        if any(len(adapter.block_ids) != adapter.shape.num_blocks for adapter in self._on_device):
            raise RuntimeError("an adapter does not hold its blocks")
        if len(self._on_host) > self._options.max_cpu_loras:
            raise RuntimeError("there are too many copies in host memory")

    @property
    def stats(self) -> AdapterStats:
        return AdapterStats(
            num_adapters=len(self._by_name),
            num_on_device=len(self._on_device),
            num_on_host=len(self._on_host),
            num_running=self._num_distinct,
            loads=self.loads,
            evictions=self.evictions,
        )

    @property
    def held_blocks(self) -> list[list[int]]:
        """The blocks of each adapter on the device."""
        return [adapter.block_ids for adapter in self._on_device]


def root_of(adapter: Adapter, *, is_long: bool) -> tuple[bool, int]:
    """The root of the adapter's prefix cache."""
    return is_long, adapter.number
