"""The relay: sends a request to a worker and its answer to the client, and retries with another worker on failure.

A request can be retried until its first data event has been sent: the client does not notice. Retries are bounded by
the attempts of one request, by the retry budget of all requests, and by the number of workers that one request may have
killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Send

from fastserve.errors import (
    FastserveError,
    InternalError,
    LoopDetectedError,
    ModelNotFoundError,
    NoWorkerError,
    RequestKilledWorkersError,
    ShortageError,
    UnsupportedCapabilityError,
)
from fastserve.gateway.answers import Answer
from fastserve.gateway.attempt import AttemptError, AttemptRunner, ClientRequest
from fastserve.gateway.dispatch import Dispatcher, Lease, no_worker
from fastserve.gateway.downstream import Downstream
from fastserve.gateway.metrics import GatewayMetrics
from fastserve.gateway.outliers import OutlierDetector
from fastserve.gateway.retry_budget import WINDOW_S, RetryBudget
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""A request that killed this many workers is not retried."""
MAX_REFUSED = 8
"""Attempts of one request that end with a refused connection. They are counted apart: the worker has not seen the
request, and no time was lost."""
CONNECTION_FAILURES = frozenset({"refused", "connect", "lost", "cut", "timeout"})
"""Kinds of failure after which the controller sends the worker no requests until its next sign of life."""


@dataclass
class _Progress:
    """Attempts of one request so far."""

    tried: list[str] = field(default_factory=list)
    num_sent: int = 0
    num_refused: int = 0
    num_deaths: int = 0
    refused_by: list[str] = field(default_factory=list)
    """Workers that refused the request with an answer; they are overruled if another one answers it."""
    client_error: Answer | None = None
    """A client error of the first worker, to be confirmed by a second one."""
    last: Answer | FastserveError | None = None
    """The answer for the client if no other worker takes over."""


class Relay:
    def __init__(
        self,
        runner: AttemptRunner,
        dispatcher: Dispatcher,
        budget: RetryBudget,
        outliers: OutlierDetector,
        metrics: GatewayMetrics,
        max_attempts: int,
        clock: Callable[[], float],
    ) -> None:
        self._runner = runner
        self._dispatcher = dispatcher
        self._budget = budget
        self._outliers = outliers
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._clock = clock
        self._granted_at: dict[str, float] = {}

    async def forward(self, request: ClientRequest, send: Send) -> None:
        """Answer the request through `send`.

        Raises a FastserveError only if nothing has been sent. When cancelled (the client has disconnected), it closes
        the connection to the worker, which ends the generation there, and releases the lease.
        """
        client = Downstream(send, request.api)
        progress = _Progress()
        self._budget.note_request()
        while True:
            try:
                async with self._dispatcher.acquire(
                    request.model, request.route, progress.tried, self._outliers.avoided()
                ) as lease:
                    if progress.tried:
                        self._metrics.retries.inc()
                    progress.tried.append(lease.address)
                    is_over = await self._try(request, lease, client, progress)
            except (NoWorkerError, ModelNotFoundError, UnsupportedCapabilityError, ShortageError) as nobody:
                await self._give_up(client, progress.client_error or progress.last or nobody)
                return
            if is_over:
                return
            if not self._may_retry(progress):
                await self._give_up(client, progress.client_error or progress.last)
                return

    async def _try(self, request: ClientRequest, lease: Lease, client: Downstream, progress: _Progress) -> bool:
        """Make one attempt. Returns whether the client has its answer."""
        try:
            answer = await self._runner.run(request, lease, client)
        except AttemptError as failure:
            return await self._fail(request, lease, client, progress, failure)
        progress.num_sent += 1
        if answer is None or answer.kind == "success":
            lease.outcome = "success"
            self._outliers.note_success(lease.address)
            for address in progress.refused_by:
                self._outliers.note_overruled(address)
            if answer is not None:
                await client.answer(answer)
            return True
        return await self._refuse(request, lease, client, progress, answer)

    async def _refuse(
        self, request: ClientRequest, lease: Lease, client: Downstream, progress: _Progress, answer: Answer
    ) -> bool:
        """Handle an error answer. Returns whether it was sent to the client."""
        if answer.kind == "client error":
            is_checked = progress.client_error is not None
            if is_checked or self._outliers.is_proven(lease.address):
                self._outliers.note_refusal(lease.address)
                await client.answer(progress.client_error or answer)
                return True
            progress.client_error = answer
            progress.refused_by.append(lease.address)
            return False
        if answer.kind == "failure":
            lease.outcome = "failed"
            self._metrics.worker_failures.labels("error").inc()
            logger.warning(
                "Request %s: worker %s answered with status %d",
                printable(request.request_id),
                printable(lease.address),
                answer.status,
            )
            progress.last = answer
            if answer.status == LoopDetectedError.status:
                progress.last = LoopDetectedError(
                    f"The request came back: the worker {printable(lease.address)} leads to an API server that had "
                    "passed it on already. Look at the addresses that workers are registered with."
                )
            return False
        progress.refused_by.append(lease.address)
        self._outliers.note_refusal(lease.address)
        if answer.kind == "foreign":
            progress.last = NoWorkerError(
                f"The workers of the model '{printable(request.model, 100)}' have no route {request.route.path} (a "
                "FastChat worker is one of those); only FastChat's own API server reaches them."
            )
        else:
            progress.last = no_worker(request.model) if answer.status == ModelNotFoundError.status else answer
        return False

    async def _fail(
        self, request: ClientRequest, lease: Lease, client: Downstream, progress: _Progress, failure: AttemptError
    ) -> bool:
        """Handle a worker that gave no answer. Returns whether an error was sent to the client."""
        lease.outcome = "failed"
        self._metrics.worker_failures.labels(failure.kind).inc()
        logger.warning(
            "Request %s: worker %s failed (%s: %s)",
            printable(request.request_id),
            printable(lease.address),
            failure.kind,
            printable(str(failure)),
        )
        progress.last = failure.error
        if failure.kind == "refused":
            progress.num_refused += 1
        else:
            progress.num_sent += 1
        if failure.kind in ("lost", "frozen"):
            self._grant_moves(lease.address)
        if failure.kind in CONNECTION_FAILURES:
            await self._dispatcher.report_failure(lease.address)
        if client.has_data:
            self._metrics.broken_streams.inc()
            await client.fail(failure.error.body()["error"])
            return True
        if failure.kind == "lost":
            progress.num_deaths += 1
        return False

    def _may_retry(self, progress: _Progress) -> bool:
        """Whether another worker may be tried; if so, charges the retry budget."""
        if progress.num_deaths >= MAX_DEATHS:
            progress.last = RequestKilledWorkersError(
                f"{MAX_DEATHS} workers died while they worked on this request, so it is not tried again. Change the "
                "request, or look into the workers' logs."
            )
            return False
        if progress.num_sent >= self._max_attempts or progress.num_refused >= MAX_REFUSED:
            return False
        if progress.num_sent == 0:
            return True
        if self._budget.try_spend():
            return True
        self._metrics.retries_denied.inc()
        return False

    def _grant_moves(self, address: str) -> None:
        """A worker has died: let its requests be retried outside the budget, once for each death."""
        now = self._clock()
        self._granted_at = {known: at for known, at in self._granted_at.items() if now - at < WINDOW_S}
        if address not in self._granted_at:
            self._granted_at[address] = now
            self._budget.grant(self._dispatcher.in_flight(address))

    async def _give_up(self, client: Downstream, last: Answer | FastserveError | None) -> None:
        """Send the client the last answer or error: no other worker takes over."""
        if isinstance(last, Answer):
            await client.answer(last)
            return
        error = last or InternalError("The request found no worker.")
        if client.started:
            await client.fail(error.body()["error"])
        else:
            raise error
