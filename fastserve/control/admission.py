"""Admission of workers to the registry.

The controller and the API servers call registered workers and send them clients' prompts. So a worker is admitted only
if its address is valid and in an allowed network, and it answers one call (the probe). An address or a model name
cannot move to a worker with another owner's key while a worker of the first owner is registered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from fastserve.access.addresses import WorkerAddress, parse_worker_address
from fastserve.errors import ConflictError, FastserveError, OverloadedError, ServiceError

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Workers waiting for their probe."""
MAX_RETRIES = 256
RETRY_INTERVAL_S = 1.0
NUM_RETRIES = 60
_MIN_KEPT = 1024


@dataclass(frozen=True)
class _Admitted:
    owner: str
    model_names: tuple[str, ...]
    has_answered: bool


class WorkerAdmission:
    """Use it as an async context manager; it owns the running probes."""

    def __init__(
        self,
        check_network: Callable[[WorkerAddress], Awaitable[None]],
        probe: Callable[[str], Awaitable[None]] | None,
        is_listed: Callable[[str], bool],
        max_probes: int,
    ) -> None:
        """`check_network` and `probe` raise a FastserveError to reject a worker. Without `probe` workers are not
        called.
        """
        self._check_network = check_network
        self._probe = probe
        self._is_listed = is_listed
        self._slots = asyncio.Semaphore(max_probes)
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._retries: dict[str, asyncio.Task[None]] = {}
        self._admitted: dict[str, _Admitted] = {}
        self._by_model: dict[str, dict[str, set[str]]] = {}
        """Addresses by model name and owner."""
        self._num_kept_at_cleaning = 0

    async def __aenter__(self) -> WorkerAdmission:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._probes.values(), *self._retries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def admit(self, name: str, owner: str, model_names: Sequence[str], *, is_ready: bool = True) -> str:
        """Check a worker; returns its normalized address if it may be registered.

        A worker that is not ready may not listen yet, so it is probed once it is ready. Raises InvalidRequestError,
        PermissionDeniedError, ConflictError, and the errors of `probe`.
        """
        known = self.find(name, owner, model_names, is_ready=is_ready)
        if known is not None:
            return known
        address = parse_worker_address(name)
        text = str(address)
        names = tuple(model_names)
        before = self._admitted.get(text) if self._is_listed(text) else None
        has_answered = before is not None and before.has_answered
        self._check_owner(text, owner, names)
        if before is None:
            await self._check_network(address)
        if is_ready and not has_answered:
            await self._probe_once(text)
            has_answered = True
        # Others may have been admitted while this one waited.
        self._check_owner(text, owner, names)
        self._note(text, _Admitted(owner, names, has_answered))
        return text

    def find(self, name: str, owner: str, model_names: Sequence[str], *, is_ready: bool = True) -> str | None:
        """The normalized address of a worker that is already registered with these values; None: call `admit`."""
        # Most addresses are normalized already and need no parsing.
        text = name if name in self._admitted else str(parse_worker_address(name))
        admitted = self._admitted.get(text)
        if admitted is None or admitted.owner != owner or not (admitted.has_answered or not is_ready):
            return None
        return text if self._is_listed(text) and admitted.model_names == tuple(model_names) else None

    async def admit_again(self, address: str, model_names: Sequence[str], *, is_ready: bool) -> None:
        """Check a registered worker whose status was polled; its owner does not change."""
        await self.admit(address, self._admitted[address].owner, model_names, is_ready=is_ready)

    def address_of(self, name: str, owner: str) -> str:
        """Normalize an address and check that it does not belong to another owner. Raises InvalidRequestError and
        ConflictError.
        """
        text = str(parse_worker_address(name))
        self._check_owner(text, owner, ())
        return text

    def retry_later(self, name: str, admit: Callable[[], Awaitable[None]]) -> None:
        """Retry `admit` for a minute: FastChat's workers register a moment before they listen, and then not again for
        45 s.
        """
        if name in self._retries or len(self._retries) >= MAX_RETRIES:
            return
        task = asyncio.create_task(self._retry(admit))
        self._retries[name] = task
        task.add_done_callback(lambda _: self._retries.pop(name, None))

    async def _retry(self, admit: Callable[[], Awaitable[None]]) -> None:
        for _ in range(NUM_RETRIES):
            await asyncio.sleep(RETRY_INTERVAL_S)
            try:
                await admit()
            except ServiceError:
                continue
            except FastserveError as error:
                logger.warning("A worker is not registered: %s", error.message)
            return

    async def _probe_once(self, address: str) -> None:
        """Probe the worker; concurrent callers share one probe."""
        if self._probe is None:
            return
        task = self._probes.get(address)
        if task is None:
            if len(self._probes) >= MAX_WAITING:
                raise OverloadedError("Too many workers register at once.")
            task = asyncio.create_task(self._run_probe(address, self._probe))
            self._probes[address] = task
            task.add_done_callback(lambda task: self._finish_probe(address, task))
        # A cancelled registration must not cancel the probe for the others.
        await asyncio.shield(task)

    def _finish_probe(self, address: str, task: asyncio.Task[None]) -> None:
        del self._probes[address]
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it when nobody waits any more

    async def _run_probe(self, address: str, probe: Callable[[str], Awaitable[None]]) -> None:
        async with self._slots:
            await probe(address)

    def _check_owner(self, address: str, owner: str, model_names: Sequence[str]) -> None:
        before = self._admitted.get(address)
        if before is not None and before.owner != owner and self._is_listed(address):
            raise self._conflict(f"The worker {address}", owner, before.owner)
        for name in model_names:
            for other, addresses in self._by_model.get(name, {}).items():
                if other != owner and any(map(self._is_listed, addresses)):
                    raise self._conflict(f"The model {name[:80]!a}", owner, other)

    def _conflict(self, what: str, owner: str, other: str) -> ConflictError:
        logger.warning("%s of owner %s is not given to owner %s.", what, ascii(other), ascii(owner))
        return ConflictError(f"{what} belongs to workers with another owner's key: stop these first, or use their key.")

    def _note(self, address: str, admitted: _Admitted) -> None:
        self._forget(address)
        self._admitted[address] = admitted
        for name in admitted.model_names:
            self._by_model.setdefault(name, {}).setdefault(admitted.owner, set()).add(address)
        if len(self._admitted) > max(_MIN_KEPT, 2 * self._num_kept_at_cleaning):
            for other in [other for other in self._admitted if other != address and not self._is_listed(other)]:
                self._forget(other)
            self._num_kept_at_cleaning = len(self._admitted)

    def _forget(self, address: str) -> None:
        admitted = self._admitted.pop(address, None)
        if admitted is None:
            return
        for name in dict.fromkeys(admitted.model_names):
            owners = self._by_model[name]
            owners[admitted.owner].discard(address)
            if not owners[admitted.owner]:
                del owners[admitted.owner]
            if not owners:
                del self._by_model[name]
