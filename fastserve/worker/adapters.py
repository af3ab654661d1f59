"""The adapters that this worker serves by name. The engine holds their weights."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec

from fastserve.engine.calls.adapters import ListAdapters, LoadAdapter, UnloadAdapter
from fastserve.engine.contract import AdapterInfo, AdapterStats, Engine
from fastserve.errors import (
    ConflictError,
    FastserveError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnsupportedCapabilityError,
)
from fastserve.observability.text import printable
from fastserve.protocol import MAX_ADAPTER_LIST_BYTES, MAX_ADAPTER_ROOT_CHARS, MAX_HELD_ADAPTERS, AdapterEntry
from fastserve.worker.adapter_root import AdapterRoot
from fastserve.worker.adapter_source import Adapter, find_adapter_folder, name_problem
from fastserve.worker.adapter_state import AdapterState, CalledAdapters
from fastserve.worker.fingerprint import files_digest

logger = logging.getLogger(__name__)

SCAN_INTERVAL_S = 1.0
_MAX_SHOWN = 1000
"""Characters of names in an error message."""


class ServedAdapters:
    """For the event loop; `resolve` may also be called in threads."""

    def __init__(
        self,
        engine: Engine,
        model_names: Sequence[str],
        *,
        is_enabled: bool,
        at_start: Iterable[Adapter] = (),
        root: Path | None = None,
        allow_any_path: bool = False,
        max_adapters: int = 4096,
        state: AdapterState | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`at_start`: adapters that the engine knows whenever it starts. `root`: folder whose members are served.
        `state` keeps the outcomes of calls; `restore` reads them.
        `on_change` is called when the names have changed.
        """
        self.is_enabled = is_enabled
        self._engine = engine
        self._model_names = tuple(model_names)
        self._at_start = {adapter.name: adapter for adapter in at_start}
        self._root = None if root is None else AdapterRoot(root)
        self._allow_any_path = allow_any_path
        self._max_adapters = max_adapters
        self._state = state
        self._saving = asyncio.Lock()
        self._on_change = on_change
        self._named = dict(self._at_start)
        """Adapters of the flags, and those that were loaded by call."""
        self._members: dict[str, Adapter] = {}
        """Those found in `root`."""
        self._withdrawn: set[str] = set()
        """Adapters of the flags and members of `root` that were unloaded by call."""
        self._in_engine = set(self._at_start)
        self._loading: dict[str, asyncio.Task[AdapterInfo]] = {}
        self._held: list[str] = []
        self._digest: tuple[tuple[str, ...], str] = ((), "")
        self._file_digests: dict[str, tuple[Adapter, str]] = {}
        """Digests of adapters' files by name, each with the adapter that it is for."""

    # ---- names --------------------------------------------------------------------------------------------------

    def resolve(self, model: str) -> str | None:
        """The adapter of a request's `model`, `NAME` or `BASE:NAME`; "" for the bare base, None for an unknown one."""
        if model in self._model_names:
            return ""
        if self._find(model) is not None:
            return model
        base, colon, name = model.rpartition(":")
        if colon and base in self._model_names and self._find(name) is not None:
            return name
        return None

    def require(self, model: str) -> str:
        """The same; raises ModelNotFoundError for an unknown one."""
        adapter = self.resolve(model)
        if adapter is None:
            raise self.unknown(model)
        return adapter

    def resolve_source(self, text: str) -> str | None:
        """The adapter that was given as this path or repository id, or has this name; None for an unknown one."""
        for adapter in [*self._named.values(), *self._members.values()]:
            if adapter.source == text:
                return adapter.name
        return text if self._find(text) is not None else None

    def served_names(self) -> list[str]:
        """The names that requests may use: the model's, then those of adapters."""
        return [*self._model_names, *(adapter.name for adapter in self.all())]

    def all(self) -> list[Adapter]:
        """The adapters, sorted by name."""
        return sorted({**self._members, **self._named}.values(), key=lambda adapter: adapter.name)

    @property
    def digest(self) -> str:
        """Changes whenever the names or their sources change; "" without adapters."""
        adapters = self.all()
        key = tuple(f"{adapter.name}\n{adapter.source}" for adapter in adapters)
        if key != self._digest[0]:
            text = "\n\n".join((*self._model_names, *key)) if key else ""
            self._digest = (key, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32] if text else "")
        return self._digest[1]

    def file_digest(self, name: str) -> str:
        """Digest of an adapter's files, as of its last load; "" for an unknown one. May read files."""
        adapter = self._find(name)
        if adapter is None:
            return ""
        known = self._file_digests.get(name)
        if known is None or known[0] != adapter:
            known = self._file_digests[name] = (adapter, files_digest([Path(adapter.path)]))
        return known[1]

    @property
    def held(self) -> list[str]:
        """Names of adapters whose weights are in memory, those on the device first, MAX_HELD_ADAPTERS at most."""
        return self._held

    def _find(self, name: str) -> Adapter | None:
        found = self._named.get(name) or self._members.get(name)
        if found is None and self._root is not None and name not in self._withdrawn:
            found = self._root.member(name)
        return found

    # ---- use ----------------------------------------------------------------------------------------------------

    async def ensure(self, name: str) -> None:
        """Make sure that the engine knows the adapter. Raises ModelNotFoundError, and what the engine raises."""
        if not name or name in self._in_engine:
            return
        if name not in self._loading:
            adapter = self._find(name)
            if adapter is None:
                raise self.unknown(name)
            self._check_room(name)
            if name not in self._named:
                self._members[name] = adapter
            self._start_loading(adapter)
        await asyncio.shield(self._loading[name])

    def _start_loading(self, adapter: Adapter) -> asyncio.Task[AdapterInfo]:
        """Load it even if nobody waits any more."""
        name = adapter.name
        task = self._loading[name] = asyncio.create_task(self._load(adapter))
        task.add_done_callback(lambda task: self._forget_task(name, task))
        return task

    def _forget_task(self, name: str, task: asyncio.Task[AdapterInfo]) -> None:
        self._loading.pop(name, None)
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it when nobody waits any more

    def unknown(self, model: str) -> ModelNotFoundError:
        served = printable(", ".join(self.served_names()), _MAX_SHOWN)
        return ModelNotFoundError(
            f"The model '{printable(model, 80)}' is not served here. Served: {served}.", param="model"
        )

    async def infos(self) -> list[tuple[Adapter, AdapterInfo | None]]:
        """All adapters, with what the engine knows of those that it has read or was started with."""
        known: dict[str, AdapterInfo] = {}
        if self.is_enabled:
            known = {info.name: info for info in (await self._engine.call(ListAdapters())).adapters}
        return [(adapter, known.get(adapter.name)) for adapter in self.all()]

    # ---- administration -----------------------------------------------------------------------------------------

    async def load(self, name: str, source: str, *, replace: bool = False) -> AdapterInfo:
        """Load an adapter and serve it. Raises RequestError; then nothing has changed."""
        if not self.is_enabled:
            raise UnsupportedCapabilityError(
                "This worker serves no adapters: start it with --enable-lora, --lora-modules, --lora-dirs or "
                "--lora-root."
            )
        if name in self._in_engine and name in self.served_names() and not replace:
            raise InvalidRequestError(
                f"The lora adapter '{printable(name)}' has already been loaded. Send load_inplace=true to replace it.",
                param="lora_name",
                code="adapter_exists",
            )
        adapter = await self._check(name, source)
        if name in self._loading:
            raise ConflictError(f"The adapter '{printable(name)}' is being loaded already.", param="lora_name")
        info = await asyncio.shield(self._start_loading(adapter))
        await self._save()
        return info

    async def restore(self) -> None:
        """After a start of the worker: serve what calls had loaded, and not what they had unloaded. An adapter that
        cannot be served any more is logged. The engine reads each when it is asked for.
        """
        if self._state is None or not self.is_enabled:
            return
        called = await asyncio.to_thread(self._state.read)
        for name in called.unloaded:
            self._named.pop(name, None)
            self._withdrawn.add(name)
        for name, source in called.loaded.items():
            try:
                adapter = await self._check(name, source)
            except FastserveError as error:
                logger.warning(
                    "The adapter %s, which was loaded by call, is not served again: %s",
                    printable(name, 80),
                    error.message,
                )
                continue
            self._named[name] = adapter
            self._withdrawn.discard(name)
        self.engine_restarted()

    async def unload(self, name: str) -> AdapterInfo | None:
        """Stop serving an adapter; returns when its last request has ended. None if it had never been read."""
        if self._find(name) is None:
            raise ModelNotFoundError(f"The lora adapter '{printable(name, 80)}' cannot be found.", param="lora_name")
        self._named.pop(name, None)
        self._members.pop(name, None)
        self._file_digests.pop(name, None)
        if name in self._at_start or (self._root is not None and self._root.member(name) is not None):
            self._withdrawn.add(name)
        self._on_change()
        is_known = name in self._in_engine
        self._in_engine.discard(name)
        await self._save()
        if not is_known:
            return None
        return await self._engine.call(UnloadAdapter(name))

    def engine_restarted(self) -> None:
        """The new engine knows only the adapters of the flags: others are loaded again when they are asked for."""
        self._in_engine = {name for name, adapter in self._at_start.items() if self._named.get(name) == adapter}
        self._held = []

    async def _load(self, adapter: Adapter) -> AdapterInfo:
        info = await self._engine.call(LoadAdapter(adapter.name, adapter.path, replace=True))
        name = adapter.name
        # Its files may be others than those of an adapter of the same name and path before.
        self._file_digests[name] = (adapter, await asyncio.to_thread(files_digest, [Path(adapter.path)]))
        self._in_engine.add(name)
        if self._members.get(name) != adapter and self._named.get(name) != adapter:
            self._named[name] = adapter
            self._withdrawn.discard(name)
            self._on_change()
        return info

    async def _check(self, name: str, source: str) -> Adapter:
        """The adapter that may be loaded under this name. Raises RequestError."""
        problem = name_problem(name)
        if problem is not None:
            raise InvalidRequestError(problem, param="lora_name")
        if name in self._model_names:
            raise InvalidRequestError(f"'{printable(name)}' is the name of the model.", param="lora_name")
        self._check_room(name)
        return Adapter(name, source, str(await asyncio.to_thread(self._allowed_path, source)))

    async def _save(self) -> None:
        """Keep the outcomes of all calls so far."""
        if self._state is None:
            return
        async with self._saving:
            loaded = {name: one.source for name, one in self._named.items() if self._at_start.get(name) != one}
            await asyncio.to_thread(self._state.write, CalledAdapters(loaded, sorted(self._withdrawn)))

    def _allowed_path(self, source: str) -> Path:
        """The folder that an administrator may load from. Raises PermissionDeniedError and InvalidRequestError."""
        for adapter in self._at_start.values():
            if source in (adapter.source, adapter.path):
                return Path(adapter.path)
        folder = None if self._root is None else self._root.folder(source)
        if folder is not None:
            return folder
        if self._allow_any_path:
            return find_adapter_folder(source)
        raise PermissionDeniedError(
            f"'{printable(source)}' is not an adapter in --lora-root or of this worker's flags, and other paths are "
            "not allowed: put it there, or start the worker with --allow-any-lora-path.",
            param="lora_path",
        )

    def _check_room(self, name: str) -> None:
        known = self._named.keys() | self._members.keys()
        if name not in known and len(known) >= self._max_adapters:
            raise OverloadedError(
                f"This worker knows {self._max_adapters} adapters and takes no more (--max-adapters): unload some."
            )

    # ---- watching -----------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Background task: find new and removed members of `root`, and which adapters are in memory."""
        listed: AdapterStats | None = None
        while True:
            if self._root is not None:
                await self._scan(self._root)
            # The list may be long, and the engine makes it between two steps.
            stats = _without_running(self._engine.stats.adapters)
            if self.is_enabled and self._in_engine and (stats is None or stats != listed):
                try:
                    infos = (await self._engine.call(ListAdapters())).adapters
                except FastserveError as error:
                    logger.debug("adapters are not listed: %s", error.message)
                else:
                    self._held, listed = _held(infos), stats
            await asyncio.sleep(SCAN_INTERVAL_S)

    async def _scan(self, root: AdapterRoot) -> None:
        """Serve the members of the folder as it is now."""
        try:
            found = await asyncio.to_thread(root.changes, self._max_adapters - len(self._named))
        except OSError as error:
            logger.warning("--lora-root cannot be read: %s", error)
            return
        if found is None:
            return
        before = self._members
        self._members = {name: one for name, one in found.items() if name not in self._withdrawn}
        if before.keys() != self._members.keys():
            self._on_change()


def listed_adapters(adapters: Sequence[Adapter]) -> list[AdapterEntry]:
    """For the controller, MAX_ADAPTER_LIST_BYTES at most: if they are more, without their roots; then without the last
    ones, which only requests to this worker itself reach.
    """
    roots = (one.source.encode(errors="replace").decode()[:MAX_ADAPTER_ROOT_CHARS] for one in adapters)
    entries = [AdapterEntry(name=one.name, root=root) for one, root in zip(adapters, roots, strict=True)]
    if _num_bytes(entries) <= MAX_ADAPTER_LIST_BYTES:
        return entries
    entries = [AdapterEntry(name=one.name) for one in adapters]
    sizes = accumulate(_num_bytes([entry]) for entry in entries)
    listed = [entry for entry, size in zip(entries, sizes, strict=True) if size <= MAX_ADAPTER_LIST_BYTES]
    if len(listed) < len(entries):
        logger.warning(
            "the names of %d adapters are too long for one list: the controller knows the first %d only.",
            len(entries),
            len(listed),
        )
    return listed


def _num_bytes(entries: Iterable[AdapterEntry]) -> int:
    """With the separators of a list."""
    return sum(len(entry.model_dump_json().encode()) + 1 for entry in entries)


def _without_running(stats: AdapterStats | None) -> AdapterStats | None:
    """What changes when adapters are loaded, unloaded, read or moved, and not with each request."""
    return None if stats is None else msgspec.structs.replace(stats, num_running=0)


def _held(infos: Iterable[AdapterInfo]) -> list[str]:
    places = ("device", "host")
    held = sorted((info for info in infos if info.location in places), key=lambda info: places.index(info.location))
    return [info.name for info in held[:MAX_HELD_ADAPTERS]]
