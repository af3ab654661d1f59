"""Which workers are listed: those with a proper address in an allowed network, that answer, and whose names are free.

The controller and the API servers call what is listed, and clients' prompts go there. So an address is checked and the
worker called once before it is listed, and neither an address nor a model name passes to a worker with another owner's
key while a worker of the first owner lives.
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
"""Workers that wait to be called."""
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
    """Open it (`async with`) before use; it owns the calls to workers that are under way."""

    def __init__(
        self,
        check_network: Callable[[WorkerAddress], Awaitable[None]],
        probe: Callable[[str], Awaitable[None]] | None,
        is_listed: Callable[[str], bool],
        max_probes: int,
    ) -> None:
        """`check_network` and `probe` raise a FastserveError for a worker that is not to be listed; without `probe`
        workers are not called.
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
        """The address, in its one form, of a worker that may be listed.

        A worker that is not ready may not listen yet: it is called when it is. Raises InvalidRequestError,
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
            await self._call(text)
            has_answered = True
        # Others may have been admitted in the meantime.
        self._check_owner(text, owner, names)
        self._note(text, _Admitted(owner, names, has_answered))
        return text

    def find(self, name: str, owner: str, model_names: Sequence[str], *, is_ready: bool = True) -> str | None:
        """The same for a worker that is listed as it says, without waiting; None when `admit` is to decide."""
        # Most give the address in its one form: it need not be parsed.
        text = name if name in self._admitted else str(parse_worker_address(name))
        admitted = self._admitted.get(text)
        if admitted is None or admitted.owner != owner or not (admitted.has_answered or not is_ready):
            return None
        return text if self._is_listed(text) and admitted.model_names == tuple(model_names) else None

    async def admit_again(self, address: str, model_names: Sequence[str], *, is_ready: bool) -> None:
        """The same for a listed worker that was asked what it serves: its owner stays."""
        await self.admit(address, self._admitted[address].owner, model_names, is_ready=is_ready)

    def address_of(self, name: str, owner: str) -> str:
        """The address of a worker that its owner speaks of. Raises InvalidRequestError and ConflictError."""
        text = str(parse_worker_address(name))
        self._check_owner(text, owner, ())
        return text

    def retry_later(self, name: str, admit: Callable[[], Awaitable[None]]) -> None:
        """Try `admit` again for a minute: FastChat's workers register a moment before they listen, and again only after
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

    async def _call(self, address: str) -> None:
        """Call the worker, once for all who wait for its answer."""
        if self._probe is None:
            return
        task = self._probes.get(address)
        if task is None:
            if len(self._probes) >= MAX_WAITING:
                raise OverloadedError("Too many workers register at once.")
            task = asyncio.create_task(self._call_in_turn(address, self._probe))
            self._probes[address] = task
            task.add_done_callback(lambda task: self._called(address, task))
        # A registration that is broken off must not end the call for the others.
        await asyncio.shield(task)

    def _called(self, address: str, task: asyncio.Task[None]) -> None:
        del self._probes[address]
        if not task.cancelled():
            task.exception()  # looked at also when nobody waits for it any more

    async def _call_in_turn(self, address: str, probe: Callable[[str], Awaitable[None]]) -> None:
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
