"""Live weight updates: one at a time, between two steps, all or nothing. No torch here.

New weights are received in a thread, beside those that compute, while steps go on. Then running requests are treated as
the update's mode says, and between two steps the new weights are put in place, the prefix cache is emptied and the
version changes. Until then nothing has changed, so a transfer that fails leaves nothing behind.

Where there is no memory for a second copy, steps stop before the first byte is received, and the weights are written
directly. If that fails, they are of no known version: requests are refused until a whole set has arrived.

Several transfers may be one update: between `start` and `finish` they are only received.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from fastserve.engine.contract import RequestOutput
from fastserve.engine.pausing import Pausing
from fastserve.engine.weight_messages import (
    DEFAULT_VERSION,
    GroupSettings,
    GroupState,
    NeedsWindowError,
    Received,
    UpdateOptions,
    WeightSource,
    WeightUpdate,
    WeightValues,
)
from fastserve.errors import ConflictError, FastserveError, UnsupportedCapabilityError, WeightsIncompleteError

logger = logging.getLogger(__name__)

SendOutputs = Callable[[list[RequestOutput]], None]


class WeightReceiver(Protocol):
    """Receives new weights beside those that compute. Methods return at once; other threads complete the futures."""

    def join(self, settings: GroupSettings) -> Future[GroupState]: ...

    def leave(self, name: str) -> GroupState: ...

    def receive(self, source: WeightSource, *, is_direct: bool = False) -> Future[Received]:
        """The future fails with NeedsWindowError before anything was received if there is no memory for a second copy
        of the weights. `is_direct`: write into those that compute."""
        ...

    def commit(self) -> None:
        """Put what has been received in place. Raises FastserveError when that is not possible; nothing has changed
        then."""
        ...

    def discard(self) -> None: ...

    @property
    def is_complete(self) -> bool:
        """Whether all weights of the model have been received since the last commit."""
        ...


class WeightChecker(Protocol):
    """Reads and checks the weights that compute (see checker.py)."""

    def values(self, name: str, num_rows: int) -> WeightValues: ...

    def checksum(self) -> str: ...

    def snapshot(self) -> None: ...

    def compare(self) -> list[str]: ...

    def randomize(self) -> None: ...


class CacheReset(Protocol):
    @property
    def num_preempted(self) -> int: ...


class UpdatableScheduler(Protocol):
    """The part of a scheduler that updates need (see scheduler.Scheduler)."""

    weight_version: str

    @property
    def has_work(self) -> bool: ...

    def abort_begun(self) -> list[RequestOutput]: ...

    def refuse_all(self, error: FastserveError) -> list[RequestOutput]: ...

    def reset_prefix_cache(self, *, reset_running_requests: bool) -> CacheReset: ...


class NoReceiver:
    """For an engine whose weights cannot change."""

    is_complete = False

    def join(self, settings: GroupSettings) -> Future[GroupState]:
        raise self._unsupported()

    def leave(self, name: str) -> GroupState:
        raise self._unsupported()

    def receive(self, source: WeightSource, *, is_direct: bool = False) -> Future[Received]:
        raise self._unsupported()

    def commit(self) -> None:
        pass

    def discard(self) -> None:
        pass

    @staticmethod
    def _unsupported() -> FastserveError:
        return UnsupportedCapabilityError("This engine has no weights that could change.")


@dataclass(slots=True)
class _Update:
    options: UpdateOptions
    send: SendOutputs
    reply: Future[WeightUpdate]
    begun_s: float
    source: WeightSource | None
    """None: `finish`, which puts in place what has been received before."""
    is_received: bool = False
    is_direct: bool = False
    holds_new: bool = False
    has_aborted: bool = False
    num_aborted: int = 0


class WeightUpdates:
    """The state of updates. All methods are called by the engine's thread, between two steps with none in flight, and
    the futures that they return are completed by it."""

    def __init__(
        self,
        scheduler: UpdatableScheduler,
        pausing: Pausing,
        receiver: WeightReceiver,
        checker: WeightChecker | None,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`wake` has `update` called soon; any thread may call it."""
        self._scheduler = scheduler
        self._pausing = pausing
        self._receiver = receiver
        self._checker = checker
        self._wake = wake
        self._clock = clock
        self._waiting: list[tuple[Future[Any], Callable[[Future[Any]], None]]] = []
        """Futures of other threads, and what follows them."""
        self._current: _Update | None = None
        self._session: UpdateOptions | None = None
        self._received = Received()
        """Since the last commit."""
        self._is_window = False
        self.count = 0
        """Updates that were put in place."""
        self.problem: str | None = None
        """Why no request can be computed; None while the weights are whole."""
        scheduler.weight_version = DEFAULT_VERSION

    @property
    def version(self) -> str:
        return self._scheduler.weight_version

    @property
    def blocks_steps(self) -> bool:
        """No step may be computed: the weights are being written."""
        return self._is_window

    @property
    def checker(self) -> WeightChecker:
        """Raises ConflictError while an update runs, and UnsupportedCapabilityError where there are no weights."""
        if self._checker is None:
            raise UnsupportedCapabilityError("This engine has no weights.")
        self._require_idle()
        return self._checker

    # ---- groups -------------------------------------------------------------------------------------------------

    def join(self, settings: GroupSettings) -> Future[GroupState]:
        joined: Future[GroupState] = Future()

        def finish(done: Future[GroupState]) -> None:
            error = done.exception()
            if error is None:
                joined.set_result(done.result())
            else:
                joined.set_exception(error)

        self._after(self._receiver.join(settings), finish)
        return joined

    def leave(self, name: str) -> GroupState:
        return self._receiver.leave(name)

    # ---- updates ------------------------------------------------------------------------------------------------

    def start(self, options: UpdateOptions, send: SendOutputs) -> None:
        """Begin an update of several transfers; one that was not finished is given up. Raises ConflictError while a
        transfer runs."""
        self._require_idle()
        self._abandon("it was given up", send)
        self._session = options

    def receive(
        self, source: WeightSource, options: UpdateOptions, send: SendOutputs, *, is_part: bool = False
    ) -> Future[WeightUpdate]:
        """Receive weights and, unless they are a part of the update that was started, put them in place. `send` gets
        the last outputs of requests that the update ends. Raises ConflictError while another update runs."""
        self._require_idle()
        if is_part and self._session is None:
            raise self._not_started()
        if not is_part and self._session is not None:
            raise ConflictError(
                "An update of several transfers has not been finished: call /finish_weight_update, or "
                "/start_weight_update to give it up."
            )
        chosen = options if self._session is None else self._session
        self._current = _Update(chosen, send, Future(), self._clock(), source, is_direct=self._is_window)
        return self._begin_transfer(self._current, source)

    def finish(self, send: SendOutputs) -> Future[WeightUpdate]:
        """Put in place what has been received since `start`. Raises ConflictError when there was none."""
        self._require_idle()
        if self._session is None:
            raise self._not_started()
        options, self._session = self._session, None
        self._current = _Update(
            options, send, Future(), self._clock(), None, is_received=True, is_direct=self._is_window
        )
        reply = self._current.reply
        self._quiesce(self._current)
        self._wake()
        return reply

    def set_version(self, version: str) -> None:
        """Rename the weights that compute. Raises ConflictError while an update runs."""
        self._require_idle()
        self._scheduler.weight_version = version

    def randomize(self) -> int:
        """Replace all weights by random numbers, to show that a later update writes them all; return the number of
        running requests that are computed anew."""
        self.checker.randomize()
        return self._scheduler.reset_prefix_cache(reset_running_requests=True).num_preempted

    @property
    def has_news(self) -> bool:
        """Whether `update` has something to do."""
        if any(future.done() for future, _ in self._waiting):
            return True
        current = self._current
        return current is not None and current.is_received and self._is_quiet(current)

    def update(self) -> None:
        """Go on with what threads have finished, and with an update that requests have made way for."""
        done = [item for item in self._waiting if item[0].done()]
        self._waiting = [item for item in self._waiting if item not in done]
        for future, follow in done:
            follow(future)
        current = self._current
        if current is not None and current.is_received and self._is_quiet(current):
            if current.source is not None and current.is_direct and not self._is_window:
                self._open_window(current, current.source)
            else:
                self._apply(current)

    # ---- steps of an update -------------------------------------------------------------------------------------

    def _require_idle(self) -> None:
        if self._current is not None:
            raise ConflictError("Another weight update is in progress. Wait for its answer.")

    @staticmethod
    def _not_started() -> ConflictError:
        return ConflictError("No update was started: call /start_weight_update first.")

    def _after(self, future: Future[Any], follow: Callable[[Future[Any]], None]) -> None:
        self._waiting.append((future, follow))
        future.add_done_callback(lambda _: self._wake())

    def _begin_transfer(self, update: _Update, source: WeightSource) -> Future[WeightUpdate]:
        try:
            received = self._receiver.receive(source, is_direct=self._is_window)
        except FastserveError:
            self._current = None
            raise
        self._after(received, lambda done: self._transferred(update, done))
        return update.reply

    def _transferred(self, update: _Update, done: Future[Received]) -> None:
        error = done.exception()
        if isinstance(error, NeedsWindowError):
            logger.warning("There is no memory for a second copy of the weights: steps stop while they are received.")
            update.is_direct = update.is_received = True
            self._quiesce(update)
        elif error is not None:
            self._fail(update, error)
        else:
            self._received = self._received + done.result()
            update.is_received = True
            if self._session is None:
                self._quiesce(update)
            else:
                self._answer(update, done.result(), 0.0, 0, "received")

    def _quiesce(self, update: _Update) -> None:
        """Have running requests make way, as the update's mode says."""
        mode = update.options.mode
        if mode == "drain" and not update.holds_new and not self._is_window:
            update.holds_new = True
            self._pausing.hold()
        elif mode == "abort" and not update.has_aborted:
            update.has_aborted = True
            aborted = self._scheduler.abort_begun()
            update.num_aborted = len(aborted)
            update.send(aborted)

    def _is_quiet(self, update: _Update) -> bool:
        if update.options.mode != "drain" or self._is_window:
            return True
        return self._pausing.is_paused or not self._scheduler.has_work

    def _open_window(self, update: _Update, source: WeightSource) -> None:
        self._is_window = True
        self._release(update)
        update.is_received = False
        try:
            received = self._receiver.receive(source, is_direct=True)
        except FastserveError as error:
            self._fail(update, error)
            return
        self._after(received, lambda done: self._transferred(update, done))

    def _apply(self, update: _Update) -> None:
        begin_s = self._clock()
        is_complete = self._receiver.is_complete
        try:
            self._receiver.commit()
        except FastserveError as error:
            self._fail(update, error)
            return
        reset = self._scheduler.reset_prefix_cache(reset_running_requests=update.options.mode == "retract")
        self.count += 1
        self._scheduler.weight_version = str(self.count) if update.options.version is None else update.options.version
        received, self._received = self._received, Received()
        self._is_window = False
        if is_complete:
            self.problem = None
        self._release(update)
        flush_s = self._clock() - begin_s
        logger.info("weights %s: %d tensors in place within %.3f s", self.version, received.num_tensors, flush_s)
        self._answer(update, received, flush_s, reset.num_preempted, "updated")

    def _answer(self, update: _Update, received: Received, flush_s: float, num_preempted: int, message: str) -> None:
        self._current = None
        spent_s = received.transfer_s
        update.reply.set_result(
            WeightUpdate(
                True,
                message,
                self.version,
                received.num_bytes,
                received.num_tensors,
                received.num_buckets,
                received.setup_s,
                received.first_s,
                received.transfer_s,
                received.load_s,
                flush_s,
                self._clock() - update.begun_s,
                received.num_bytes / spent_s / 1e9 if spent_s else 0.0,
                num_preempted,
                update.num_aborted,
            )
        )

    def _fail(self, update: _Update, error: BaseException) -> None:
        self._release(update)
        self._current = None
        self._abandon(str(error), update.send)
        update.reply.set_exception(error)

    def _abandon(self, reason: str, send: SendOutputs) -> None:
        """Forget what has been received; if it was written into the weights that compute, they are no longer whole."""
        if self._is_window:
            self.problem = f"A weight update failed halfway ({reason}), and no whole set of weights has come since."
            logger.error("%s Requests are refused until then.", self.problem)
            send(self._scheduler.refuse_all(WeightsIncompleteError(self.problem)))
        self._receiver.discard()
        self._session = None
        self._received = Received()
        self._is_window = False

    def _release(self, update: _Update) -> None:
        if update.holds_new:
            update.holds_new = False
            self._pausing.release()
