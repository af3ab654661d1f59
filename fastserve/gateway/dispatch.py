"""The client of the controller: which worker takes a request, told with a lease; by our own table while it is away.

As long as the controller answers, it decides (`/acquire`), because it alone sees every request. Once it fails to
answer, requests are placed at once by the cached table, and the poller, which reads the table every second anyway,
finds out when the controller is back: no request waits for a controller that is known to be away.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from fastserve.errors import InvalidRequestError, ModelNotFoundError, NoWorkerError
from fastserve.gateway.table import CachedTable, parse_table
from fastserve.observability.logging import Throttle
from fastserve.protocol import (
    AcquireRequest,
    AcquireResponse,
    ReleaseRequest,
    RoutingTable,
    ServingRequest,
    ServingResponse,
    WorkerName,
)

logger = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT", bound=BaseModel)

CONTROLLER_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
POLL_INTERVAL_S = 1.0
POLL_INTERVAL_AWAY_S = 0.2
RELEASE_RETRY_S = 0.2
RESTART_PAUSE_S = 1.0
BAD_ROWS_LOG_INTERVAL_S = 5.0
RELEASE_LIFETIME_S = 10.0
"""A lease that could not be given back for so long is left to the controller: it drops those that no worker lists."""


class ControllerAwayError(Exception):
    """The controller could not be reached, or its answer was not one."""


@dataclass(frozen=True)
class Lease:
    id: str
    address: str


class Dispatcher:
    """Made by `open_dispatcher`, which owns its background tasks."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller_address: str,
        clock: Callable[[], float],
        rng: random.Random,
        count_bad_rows: Callable[[float], object],
    ) -> None:
        self._count_bad_rows = count_bad_rows
        self._bad_rows_log = Throttle(BAD_ROWS_LOG_INTERVAL_S, clock)
        self._session = session
        self._controller_address = controller_address.rstrip("/")
        self._clock = clock
        self._table = CachedTable(clock, rng)
        self._in_flight: Counter[str] = Counter()
        self._controller_answers = True
        self._away = asyncio.Event()
        self._unreleased: dict[str, float] = {}
        self._releasable = asyncio.Event()

    @asynccontextmanager
    async def acquire(self, model: str, exclude: Collection[str] = ()) -> AsyncIterator[Lease]:
        """A worker for one request to `model`, other than those in `exclude`, for the time of the block.

        Raises ModelNotFoundError when nobody serves the model, NoWorkerError when no worker is left for it.
        """
        lease_id = secrets.token_hex(12)
        try:
            address = await self._place(model, lease_id, exclude)
            self._in_flight[address] += 1
            try:
                yield Lease(lease_id, address)
            finally:
                self._in_flight[address] -= 1
                if not self._in_flight[address]:
                    del self._in_flight[address]
        finally:
            # Also when the asking itself was broken off: the controller may have granted the lease by then.
            self._unreleased[lease_id] = self._clock() + RELEASE_LIFETIME_S
            self._releasable.set()

    async def report_failure(self, address: str) -> None:
        """Tell the controller that a connection to this worker failed; waits a second at most and never fails."""
        self._table.suspect(address)
        self._table.record(address, failed=True)
        if self._controller_answers:
            try:
                await self._post("/report_failure", WorkerName(worker_name=address))
            except ControllerAwayError as error:
                self._note_away(error)

    async def refresh(self) -> None:
        """Read the controller's table anew; keep the last one when the controller is away."""
        try:
            position = f"epoch={self._table.epoch}&since={self._table.version}"
            table = self._parse_table(await self._request("GET", f"/workers?{position}", None))
        except ControllerAwayError as error:
            self._note_away(error)
            return
        self._table.update(table, self._in_flight)
        if not self._controller_answers:
            logger.info("The controller at %s answers again.", self._controller_address)
        self._controller_answers = True
        self._away.clear()

    def model_names(self) -> list[str]:
        """The models of the last table, sorted, each once."""
        return self._table.model_names()

    async def is_serving(self, lease: Lease) -> bool:
        """Whether the lease's worker has lately said that it is at work on it."""
        if not self._controller_answers:
            return False
        try:
            answer = await self._post("/serving", ServingRequest(leases=[lease.id]))
            return lease.id in _parse(ServingResponse, answer).leases
        except ControllerAwayError as error:
            self._note_away(error)
            return False

    def _parse_table(self, content: bytes) -> RoutingTable:
        """Raises ControllerAwayError when it is no table; rows that are not valid are counted, named and left out."""
        try:
            table, problems = parse_table(content)
        except InvalidRequestError as error:
            raise ControllerAwayError(f"not a routing table: {error.message}") from error
        if problems:
            self._count_bad_rows(len(problems))
            if self._bad_rows_log.passes():
                logger.warning("%d rows of the controller's table are left out: %s", len(problems), problems[0])
        return table

    async def _place(self, model: str, lease_id: str, exclude: Collection[str]) -> str:
        answer: AcquireResponse | None = None
        if self._controller_answers:
            asked = AcquireRequest(model=model, lease=lease_id, exclude=list(exclude))
            try:
                answer = _parse(AcquireResponse, await self._post("/acquire", asked))
            except ControllerAwayError as error:
                self._note_away(error)
        if answer is not None and answer.address and answer.address not in exclude:
            return answer.address
        # No controller, or one that knows no worker: perhaps it has just been restarted, and our table knows better.
        address = self._table.choose(model, exclude, self._in_flight)
        if address:
            return address
        if answer is not None and not answer.known:
            raise ModelNotFoundError(
                f"The model '{model}' does not exist; /v1/models lists those that do.", param="model"
            )
        if answer is None and not self._table.model_names():
            raise NoWorkerError("The controller cannot be reached and no worker is known yet. Try again in a moment.")
        raise NoWorkerError(f"No worker can take a request to the model '{model}' now. Try again in a moment.")

    def _note_away(self, error: ControllerAwayError) -> None:
        if self._controller_answers:
            logger.warning("The controller at %s does not answer (%s).", self._controller_address, error)
        self._controller_answers = False
        self._away.set()

    async def _post(self, path: str, message: BaseModel) -> bytes:
        return await self._request("POST", path, message.model_dump_json().encode())

    async def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        try:
            async with self._session.request(
                method,
                self._controller_address + path,
                data=body,
                headers={"content-type": "application/json"},
                timeout=CONTROLLER_TIMEOUT,
                allow_redirects=False,
            ) as response:
                content = await response.read()
                if response.status != 200:
                    raise ControllerAwayError(f"{path} answered with status {response.status}")
                return content
        except TimeoutError as error:
            raise ControllerAwayError(f"{path} took longer than {CONTROLLER_TIMEOUT.total} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ControllerAwayError(str(error) or type(error).__name__) from error

    async def poll(self) -> None:
        """Background task: keep the table fresh, and look more often while the controller is away."""
        while True:
            await self.refresh()
            if self._controller_answers:
                try:
                    await asyncio.wait_for(self._away.wait(), POLL_INTERVAL_S)
                except TimeoutError:
                    continue
            await asyncio.sleep(POLL_INTERVAL_AWAY_S)

    async def send_releases(self) -> None:
        """Background task: give leases back, as many at a time as have piled up since the last call."""
        while True:
            await self._releasable.wait()
            if not await self._give_back():
                await asyncio.sleep(RELEASE_RETRY_S)
            now = self._clock()
            for lease_id in [lease_id for lease_id, until in self._unreleased.items() if until <= now]:
                del self._unreleased[lease_id]
            if not self._unreleased:
                self._releasable.clear()

    async def _give_back(self) -> bool:
        if not self._controller_answers:
            return False
        leases = list(self._unreleased)
        try:
            await self._post("/release", ReleaseRequest(leases=leases))
        except ControllerAwayError as error:
            self._note_away(error)
            return False
        for lease_id in leases:
            del self._unreleased[lease_id]
        return True

    async def flush(self) -> None:
        """At shutdown, after the background tasks have ended: one last try to give back what is left."""
        if self._unreleased and not await self._give_back():
            logger.info("Not all leases could be given back; the controller will drop them.")


@asynccontextmanager
async def open_dispatcher(
    session: aiohttp.ClientSession, controller_address: str, count_bad_rows: Callable[[float], object] = lambda _: None
) -> AsyncIterator[Dispatcher]:
    """A dispatcher whose background tasks live as long as the block; the first table has been asked for on entering."""
    dispatcher = Dispatcher(session, controller_address, time.monotonic, random.Random(), count_bad_rows)
    await dispatcher.refresh()
    tasks = [asyncio.ensure_future(_keep_running(loop)) for loop in (dispatcher.poll, dispatcher.send_releases)]
    try:
        yield dispatcher
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dispatcher.flush()


async def _keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Start the loop again when a defect ends it: requests would go on, by a table that gets older and older."""
    while True:
        try:
            await loop()
        except Exception:
            logger.exception("A background task of the dispatcher failed; it is started again.")
        await asyncio.sleep(RESTART_PAUSE_S)


def _parse(kind: type[AnswerT], content: bytes) -> AnswerT:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ControllerAwayError(f"not a {kind.__name__}: {error.errors()[0]['msg']}") from error
