"""Client of the controller: acquires a worker for each request, or chooses one itself while the controller is away.

As long as the controller answers, it decides (`/acquire`), because only it sees the requests of all API servers. Once
it fails to answer, requests are dispatched by the cached table at once, and the poller, which reads the table every
second anyway, notices when the controller is back. So no request waits for a controller that is known to be away.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

from fastserve.access.addresses import is_worker_address
from fastserve.access.outgoing import read_bounded
from fastserve.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NoWorkerError,
    ShortageError,
)
from fastserve.gateway.known_adapters import KnownAdapters
from fastserve.gateway.known_models import KnownModels
from fastserve.gateway.table import CachedTable, parse_table
from fastserve.observability.logging import Throttle
from fastserve.observability.text import printable
from fastserve.openai.routes import MODEL_ROUTES, ModelRoute, unsupported
from fastserve.protocol import (
    MAX_NAME_CHARS,
    MAX_RELEASES,
    AcquireRequest,
    AcquireResponse,
    AdapterTable,
    ReleaseRequest,
    RoutingTable,
    ServedAdapter,
    ServingRequest,
    ServingResponse,
    WorkerName,
)
from fastserve.serving.shortage import is_own_shortage

logger = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT", bound=BaseModel)

CONTROLLER_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
POLL_INTERVAL_S = 1.0
POLL_INTERVAL_AWAY_S = 0.2
RELEASE_RETRY_S = 0.2
RESTART_PAUSE_S = 1.0
PROBE_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
MAX_PROBES = 64
"""Probes of workers at the same time."""
ADAPTERS_MAX_AGE_S = 0.2
"""Age of the list of adapters from which on it is fetched again before an unknown one is refused."""
SHOWN_NAME_CHARS = 100
MAX_SHOWN_NAMES, MAX_SHOWN_CHARS = 100, 1000
"""Bounds of the names in an error message."""
BAD_ROWS_LOG_INTERVAL_S = 5.0
MAX_CONTROLLER_ANSWER_BYTES = 2**27
"""Enough for a routing table of MAX_WORKERS rows; a longer answer is invalid."""
RELEASE_LIFETIME_S = 10.0
"""How long the release of a lease is retried. After that the controller drops the lease, as no worker lists it."""


class ControllerAwayError(Exception):
    """The controller could not be reached, or its answer was invalid."""


class ControllerBusyError(ControllerAwayError):
    """The controller refused a request because it is overloaded."""


Outcome = Literal["success", "failed", "unused"]


@dataclass(frozen=True)
class _Release:
    outcome: Outcome
    until: float
    """Time after which it is no longer retried."""


@dataclass
class Lease:
    """A worker for one request."""

    id: str
    address: str
    outcome: Outcome = "unused"
    """How the request ended; reported to the controller when the lease is released."""


class Dispatcher:
    """Made by `open_dispatcher`, which owns its background tasks."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller_address: str,
        clock: Callable[[], float],
        rng: random.Random,
        count_bad_rows: Callable[[float], object],
        routes: Sequence[ModelRoute],
    ) -> None:
        self._count_bad_rows = count_bad_rows
        self._routes = routes
        self._bad_rows_log = Throttle(BAD_ROWS_LOG_INTERVAL_S, clock)
        self.session = session
        self._controller_address = controller_address.rstrip("/")
        self._clock = clock
        self._table = CachedTable(clock, rng)
        self._in_flight: Counter[str] = Counter()
        self._known_models = KnownModels(clock)
        self._controller_answers = True
        self._away = asyncio.Event()
        self._unreleased: dict[str, _Release] = {}
        self._releasable = asyncio.Event()
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        self._has_missing = asyncio.Event()
        self._adapters = KnownAdapters([])
        self._adapters_version = 0
        self._refreshed_at = -math.inf
        self._refreshing = asyncio.Lock()

    @asynccontextmanager
    async def acquire(
        self, model: str, route: ModelRoute, exclude: Collection[str] = (), avoid: Collection[str] = ()
    ) -> AsyncIterator[Lease]:
        """Acquire a worker for one request to `model` on `route`, for the duration of the block: none of `exclude`, and
        one of `avoid` only if there is no other.

        Raises ModelNotFoundError if nobody serves the model, UnsupportedCapabilityError if its workers do not offer the
        route, NoWorkerError if no worker is left, and ShortageError if this process has no file or port left to ask
        the controller.
        """
        lease = Lease(secrets.token_hex(12), "")
        try:
            lease.address = await self._choose_worker(model, route, lease.id, exclude, avoid)
            self._in_flight[lease.address] += 1
            try:
                yield lease
            finally:
                if lease.outcome != "unused":
                    self._table.record(lease.address, failed=lease.outcome == "failed")
                self._in_flight[lease.address] -= 1
                if not self._in_flight[lease.address]:
                    del self._in_flight[lease.address]
        finally:
            # Also if `/acquire` was cancelled: the controller may have granted the lease by then.
            self._unreleased[lease.id] = _Release(lease.outcome, self._clock() + RELEASE_LIFETIME_S)
            self._releasable.set()

    def in_flight(self, address: str) -> int:
        """Number of this process's requests on the worker."""
        return self._in_flight[address]

    @contextmanager
    def watching(self, address: str, on_frozen: Callable[[], None]) -> Iterator[None]:
        """Within the block, `on_frozen` is called if the worker is found to be frozen."""
        watchers = self._watchers.setdefault(address, [])
        watchers.append(on_frozen)
        try:
            yield
        finally:
            watchers.remove(on_frozen)
            if not watchers:
                self._watchers.pop(address, None)

    async def report_failure(self, address: str) -> None:
        """Report to the controller that a connection to this worker failed. Waits a second at most and never raises."""
        self._table.suspect(address)
        if self._controller_answers:
            try:
                await self._post("/report_failure", WorkerName(worker_name=address))
            except ShortageError as error:
                logger.warning("The failure of worker %s is not reported: %s", printable(address), error.message)
            except ControllerAwayError as error:
                self._note_away(error)

    async def ensure_fresh(self, max_age_s: float = 0.0) -> None:
        """Refresh the table unless that was done within `max_age_s`. Concurrent callers share one refresh."""
        asked_at = self._clock()
        async with self._refreshing:
            if self._refreshed_at < asked_at - max_age_s:
                await self.refresh()
                self._refreshed_at = self._clock()

    async def refresh(self) -> None:
        """Fetch the controller's table; keep the last one if the controller is away."""
        try:
            position = f"epoch={self._table.epoch}&since={self._table.version}"
            table = self._parse_table(await self._request("GET", f"/workers?{position}", None))
            if table.adapters_version != self._adapters_version or table.epoch != self._table.epoch:
                listed = _parse(AdapterTable, await self._request("GET", "/adapters", None))
                self._adapters, self._adapters_version = KnownAdapters(listed.adapters or []), listed.version
        except ShortageError:
            return
        except ControllerAwayError as error:
            self._note_away(error)
            return
        # Requests are never sent to other addresses, even if the controller lists them.
        proper = [row for row in table.workers if is_worker_address(row.address)]
        self._table.update(table.model_copy(update={"workers": proper}), self._in_flight)
        self._known_models.note(self._table.offered())
        if any(not self._table.is_listed(address) for address in self._watchers):
            self._has_missing.set()
        if not self._controller_answers:
            logger.info("The controller at %s answers again.", self._controller_address)
        self._controller_answers = True
        self._away.clear()

    def model_names(self) -> list[str]:
        """The models of the last table, sorted and unique."""
        return self._table.model_names()

    def context_length(self, model: str) -> int | None:
        """Maximum tokens of a prompt and its answer together, the least of the model's workers; None: unknown."""
        return self._table.context_length(model)

    async def is_serving(self, lease: Lease) -> bool:
        """Whether the worker listed the lease in its last heartbeat; while the controller is away, whether the worker
        is alive.
        """
        if not self._controller_answers:
            return not await self._is_frozen(lease.address)
        try:
            answer = await self._post("/serving", ServingRequest(leases=[lease.id]))
            return lease.id in _parse(ServingResponse, answer).leases
        except (ShortageError, ControllerBusyError):
            return True  # unknown, and no reason to give the worker up
        except ControllerAwayError as error:
            self._note_away(error)
            return not await self._is_frozen(lease.address)

    def _parse_table(self, content: bytes) -> RoutingTable:
        """Parse a table; invalid rows are counted, logged and left out. Raises ControllerAwayError otherwise."""
        try:
            table, problems = parse_table(content)
        except InvalidRequestError as error:
            raise ControllerAwayError(f"not a routing table: {error.message}") from error
        if problems:
            self._count_bad_rows(len(problems))
            if self._bad_rows_log.passes():
                logger.warning("%d rows of the controller's table are left out: %s", len(problems), problems[0])
        return table

    def is_known(self, model: str) -> bool:
        """Whether a worker has served the model lately, and its name means one thing."""
        return self._known_models.contains(model) and not self._adapters.choices(model)

    async def _choose_worker(
        self, model: str, route: ModelRoute, lease_id: str, exclude: Collection[str], avoid: Collection[str]
    ) -> str:
        if len(model) > MAX_NAME_CHARS:
            raise self.unknown_model(model)  # no worker can serve such a name
        if avoid:
            try:
                return await self._choose_worker(model, route, lease_id, {*exclude, *avoid}, ())
            except NoWorkerError:
                pass
        answer: AcquireResponse | None = None
        if self._controller_answers:
            message = AcquireRequest(model=model, lease=lease_id, exclude=list(exclude), capability=route.capability)
            try:
                answer = _parse(AcquireResponse, await self._post("/acquire", message))
            except ControllerAwayError as error:
                self._note_away(error)
        if answer is not None and answer.address not in exclude and is_worker_address(answer.address):
            self._known_models.note({model: [route.capability]})
            return answer.address
        # The controller is away, or has no worker: it may have just been restarted, and the cached table is better.
        # Workers that it lists are not chosen against it: it may have reasons (a circuit breaker, a model that loads).
        # An adapter is chosen by its base model, whose workers know it.
        adapter = self._adapters.find(model)
        base = model if adapter is None else adapter.parent
        address = self._table.choose(base, route.capability, exclude, self._in_flight)
        if address and (answer is None or not answer.known or not self._table.is_listed(address)):
            return address
        if answer is None and not self._table.model_names():
            raise NoWorkerError("The controller cannot be reached and no worker is known yet. Try again in a moment.")
        if answer is not None and not answer.known and not self.is_known(model):
            raise self.unknown_model(model)
        offered = self._table.capabilities(model) if answer is None or not answer.known else answer.capabilities
        if offered and route.capability not in offered and not self._known_models.contains(model, route.capability):
            raise unsupported(model, route, offered, self._routes)
        raise no_worker(model, None if answer is None else answer.retry_after_s)

    def base_models(self) -> list[str]:
        """Models that are no adapters, each by the first name of its workers."""
        return self._table.first_names()

    def unknown_model(self, model: str) -> ModelNotFoundError:
        """The error for a name that nobody serves, or that adapters of several models have, with the names of models
        and adapters that are served.
        """
        shown = printable(model, SHOWN_NAME_CHARS)
        choices = self._adapters.choices(model)
        if choices:
            listed = printable(", ".join(choices[:MAX_SHOWN_NAMES]), MAX_SHOWN_CHARS)
            return ModelNotFoundError(
                f"Several models have an adapter '{shown}'. Name the model too: {listed}.", param="model"
            )
        names = itertools.islice(itertools.chain(self.model_names(), self.adapters()), MAX_SHOWN_NAMES)
        served = printable(", ".join(names), MAX_SHOWN_CHARS)
        return ModelNotFoundError(
            f"The model '{shown}' does not exist. Served: {served or 'none yet'}; /v1/models lists all.", param="model"
        )

    def adapters(self) -> dict[str, ServedAdapter]:
        """The adapters of the controller's last list by their ids."""
        return dict(self._adapters.ids(frozenset(self.model_names())))

    def find_adapter(self, model: str) -> tuple[str, ServedAdapter] | None:
        """Id and adapter of a request's `model`; None if it names no adapter, or adapters of several models."""
        adapter = self._adapters.find(model)
        return None if adapter is None else (self._adapters.id_of(adapter, self.model_names()), adapter)

    async def find_source(self, source: str, base: str | None) -> str:
        """BASE:NAME of the adapter that was loaded from this path or repository id, or has this name, of the model
        `base` if that is given.

        Raises ModelNotFoundError for an unknown one, InvalidRequestError for one of several models.
        """
        found = self._adapters.from_source(source)
        if not found:
            await self.ensure_fresh(ADAPTERS_MAX_AGE_S)
            found = self._adapters.from_source(source)
        if not found:
            names = itertools.islice(self.adapters(), MAX_SHOWN_NAMES)
            served = printable(", ".join(names), MAX_SHOWN_CHARS)
            raise ModelNotFoundError(
                f"The adapter '{printable(source, SHOWN_NAME_CHARS)}' ('lora_dir') is not served. Served: "
                f"{served or 'none'}. Leave it out for the base model.",
                param="lora_dir",
            )
        if base is not None:
            return f"{base}:{next((one.name for one in found if one.parent == base), found[0].name)}"
        parents = list(dict.fromkeys(one.parent for one in found))
        if len(parents) > 1:
            raise InvalidRequestError(
                f"Several models have the adapter '{printable(source, SHOWN_NAME_CHARS)}' ('lora_dir'). Give one of "
                f"them as 'model': {printable(', '.join(parents[:MAX_SHOWN_NAMES]), MAX_SHOWN_CHARS)}.",
                param="model",
            )
        return f"{parents[0]}:{found[0].name}"

    def workers_of(self, base: str) -> list[str]:
        """Addresses of the workers of a base model."""
        return self._table.workers_of(base)

    def load_of(self, model: str) -> tuple[int, int]:
        """Number of workers that serve a model or adapter, and of all requests on them as far as this process knows."""
        adapter = self.find_adapter(model)
        addresses = self._table.workers_of(model if adapter is None else adapter[1].parent)
        return len(addresses), sum(self._table.load_of(address, self._in_flight) for address in addresses)

    def _note_away(self, error: ControllerAwayError) -> None:
        if isinstance(error, ControllerBusyError):
            return
        if self._controller_answers:
            logger.warning("The controller at %s does not answer (%s).", self._controller_address, error)
        self._controller_answers = False
        self._away.set()

    async def watch_missing(self) -> None:
        """Background task: probe workers that have left the table while they have requests of this process.

        A worker leaves the table when it shuts down, when a connection to it failed, when the controller was restarted,
        and when its heartbeats have stopped. Only in the last case are its requests lost.
        """
        while True:
            await self._has_missing.wait()
            self._has_missing.clear()
            missing = [address for address in self._watchers if not self._table.is_listed(address)]
            for start in range(0, len(missing), MAX_PROBES):
                await asyncio.gather(*(self._probe(address) for address in missing[start : start + MAX_PROBES]))

    async def _probe(self, address: str) -> None:
        """Notify the watchers of the worker if it gives no sign of life."""
        if await self._is_frozen(address) and not self._table.is_listed(address):
            watchers = list(self._watchers.get(address, ()))
            logger.warning(
                "Worker %s sends no heartbeats and does not answer: %d requests leave it.",
                printable(address),
                len(watchers),
            )
            for on_frozen in watchers:
                on_frozen()

    async def _is_frozen(self, address: str) -> bool:
        """Whether the worker does not answer in time. A refused connection is another case: the machine is up, so the
        worker's open connections are either closed or still served by a process that is about to end.
        """
        try:
            async with self.session.get(address.rstrip("/") + "/health", timeout=PROBE_TIMEOUT, allow_redirects=False):
                return False
        except TimeoutError:
            return True
        except (aiohttp.ClientError, OSError):
            return False

    async def _post(self, path: str, message: BaseModel) -> bytes:
        return await self._request("POST", path, message.model_dump_json().encode())

    async def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        try:
            async with self.session.request(
                method,
                self._controller_address + path,
                data=body,
                headers={"content-type": "application/json"},
                timeout=CONTROLLER_TIMEOUT,
                allow_redirects=False,
            ) as response:
                content = await read_bounded(response, MAX_CONTROLLER_ANSWER_BYTES)
                if response.status == 401:
                    raise ControllerAwayError("it has another cluster key: FASTSERVE_CLUSTER_KEY, --cluster-key-file")
                if response.status == 421:
                    raise ControllerAwayError("it does not go by this name: start it with --allowed-hosts NAME")
                if response.status in (429, 503):
                    raise ControllerBusyError(f"{path} answered with status {response.status}")
                if response.status != 200:
                    raise ControllerAwayError(f"{path} answered with status {response.status}: is it a controller?")
                return content
        except TimeoutError as error:
            raise ControllerAwayError(f"{path} took longer than {CONTROLLER_TIMEOUT.total} s") from error
        except (aiohttp.ClientError, OSError) as error:
            if is_own_shortage(error):
                raise ShortageError(
                    "This API server has no open file or port left for the controller. Try again in a moment.",
                    code="server_out_of_resources",
                ) from error
            raise ControllerAwayError(str(error) or type(error).__name__) from error

    async def poll(self) -> None:
        """Background task: refresh the table, more often while the controller is away."""
        while True:
            await self.refresh()
            if self._controller_answers:
                try:
                    await asyncio.wait_for(self._away.wait(), POLL_INTERVAL_S)
                except TimeoutError:
                    continue
            await asyncio.sleep(POLL_INTERVAL_AWAY_S)

    async def send_releases(self) -> None:
        """Background task: release leases, in batches of those that have ended since the last call."""
        while True:
            await self._releasable.wait()
            if not await self._release_batch():
                await asyncio.sleep(RELEASE_RETRY_S)
            now = self._clock()
            for lease_id in [lease_id for lease_id, release in self._unreleased.items() if release.until <= now]:
                del self._unreleased[lease_id]
            if not self._unreleased:
                self._releasable.clear()

    async def _release_batch(self) -> bool:
        if not self._controller_answers:
            return False
        leases = list(itertools.islice(self._unreleased, MAX_RELEASES))
        outcomes = {lease_id: self._unreleased[lease_id].outcome for lease_id in leases}
        failed = [lease_id for lease_id, outcome in outcomes.items() if outcome == "failed"]
        unused = [lease_id for lease_id, outcome in outcomes.items() if outcome == "unused"]
        try:
            await self._post("/release", ReleaseRequest(leases=leases, failed=failed, unused=unused))
        except ShortageError:
            return False
        except ControllerAwayError as error:
            self._note_away(error)
            return False
        for lease_id in leases:
            del self._unreleased[lease_id]
        return True

    async def flush(self) -> None:
        """At shutdown, after the background tasks have ended: try once more to release the leases that are left."""
        if self._unreleased and not await self._release_batch():
            logger.info("Not all leases could be given back; the controller will drop them.")


def no_worker(model: str, retry_after_s: float | None = None) -> NoWorkerError:
    shown = printable(model, SHOWN_NAME_CHARS)
    return NoWorkerError(
        f"No worker can take a request to the model '{shown}' now. Try again in a moment.", retry_after_s=retry_after_s
    )


@asynccontextmanager
async def open_dispatcher(
    session: aiohttp.ClientSession,
    controller_address: str,
    count_bad_rows: Callable[[float], object] = lambda _: None,
    routes: Sequence[ModelRoute] = MODEL_ROUTES,
) -> AsyncIterator[Dispatcher]:
    """A dispatcher whose background tasks run within the block. The table is requested once before entering it."""
    dispatcher = Dispatcher(session, controller_address, time.monotonic, random.Random(), count_bad_rows, routes)
    await dispatcher.refresh()
    loops = (dispatcher.poll, dispatcher.send_releases, dispatcher.watch_missing)
    tasks = [asyncio.ensure_future(_keep_running(loop)) for loop in loops]
    try:
        yield dispatcher
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dispatcher.flush()


async def _keep_running(loop: Callable[[], Awaitable[None]]) -> None:
    """Restart the loop if a defect ends it: otherwise the table would get outdated and leases would pile up."""
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
