"""Direct answers: a fast path, without a task, for small messages that come by the thousand over open connections.

uvicorn parses each header in Python, makes a task and a dozen other objects for each request, and passes it through all
middleware; handling a heartbeat takes a fraction of that time. So an endpoint may offer a function for requests that
repeat the one it has just answered: on the same connection and with the same head, byte for byte except for the length
of the body, so that the results of parsing and checking that head hold for them too. The function gets the body and
answers at once, or returns None for the normal path. After REPEAT_S one request takes the normal path again, as checks
may depend on more than the head (keys that have changed).

When many requests come at once, `DirectQueue` answers urgent ones (somebody waits for them) before routine messages,
and routine messages in short slices, so that many of them do not delay an urgent one.
"""

from __future__ import annotations

import functools
import random
import re
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REPEAT_S = 40.0
MAX_DIRECT_BYTES = 64 * 1024
"""Longest body; requests with longer ones take the normal path."""
MAX_SLICE_S = 0.5e-3
"""Seconds for which routine messages are answered before the event loop checks for urgent ones again."""
MAX_ANSWERED_AT_ONCE = 4
"""Requests answered as soon as they are read, until the queue has run."""
_EXTENSION = "fastserve.direct"
_END_OF_HEAD = b"\r\n\r\n"
_HEAD = re.compile(
    rb"(POST [^\r\n]+ HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*?content-length: )(\d+)(\r\n(?:[^\r\n]+\r\n)*\r\n)", re.I
)
_MAX_LENGTH_DIGITS = len(str(MAX_DIRECT_BYTES))

DirectAnswer = Callable[[bytes], bytes | None]
"""Takes a body and returns the JSON of an answer with status 200, or None for the normal path. Must not raise."""


def offer_direct_answers(scope: Scope, answer: DirectAnswer, *, is_routine: bool = False) -> None:
    """Called by an endpoint that has accepted this request: `answer` may answer repetitions of it.

    `is_routine`: nobody waits for the answers, so other requests are answered first.
    """
    offer = scope.get("extensions", {}).get(_EXTENSION)
    if offer is not None:
        offer(answer, is_routine)


class _Offer(NamedTuple):
    before_length: bytes
    after_length: bytes
    answer: DirectAnswer
    until: float
    is_routine: bool


class DirectQueue:
    """Connections of one server with requests to answer; each is in it at most once.

    A few requests are answered as soon as they are read, which saves an iteration of the event loop. All others wait in
    the queue like the tasks of other requests; otherwise thousands of busy connections would starve the event loop.
    """

    def __init__(self, loop: AbstractEventLoop, clock: Callable[[], float] = time.perf_counter) -> None:
        self._loop = loop
        self._clock = clock
        self._urgent: deque[DirectProtocol] = deque()
        self._routine: deque[DirectProtocol] = deque()
        self._is_scheduled = False
        self._has_postponed = False
        self._num_at_once_left = MAX_ANSWERED_AT_ONCE
        self._default_headers: object = None
        self._head = b""

    def may_answer_at_once(self) -> bool:
        """Whether a request that was just read may skip the queue; if so, it is counted."""
        if self._is_scheduled or not self._num_at_once_left:
            return False
        self._num_at_once_left -= 1
        return True

    def put(self, connection: DirectProtocol, *, is_routine: bool) -> None:
        """Schedule a call of `receive_waiting` of the connection."""
        (self._routine if is_routine else self._urgent).append(connection)
        if not self._is_scheduled:
            self._schedule()

    def answer_head(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """Head of an answer up to the value of Content-Length, its last header. uvicorn renews the list each second."""
        if default_headers is not self._default_headers:
            lines = [b"HTTP/1.1 200 OK", *(b"%b: %b" % header for header in default_headers)]
            self._head = b"\r\n".join([*lines, b"content-type: application/json", b"content-length: "])
            self._default_headers = default_headers
        return self._head

    def _schedule(self) -> None:
        self._is_scheduled = True
        self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        has_urgent = bool(self._urgent)
        for _ in range(len(self._urgent)):
            self._urgent.popleft().receive_waiting()
        if has_urgent and not self._has_postponed:
            # Answers are sent at the end of this iteration of the event loop, so routine messages wait for the next
            # one. They wait only once, or a steady flow of urgent requests would starve them.
            self._has_postponed = True
        else:
            self._has_postponed = False
            self._run_routine()
        if self._is_scheduled:
            return
        if self._routine or self._urgent:
            self._schedule()
        else:
            self._num_at_once_left = MAX_ANSWERED_AT_ONCE

    def _run_routine(self) -> None:
        routine, clock = self._routine, self._clock
        end = clock() + MAX_SLICE_S
        while routine:
            routine.popleft().receive_waiting()
            if clock() >= end:
                return


class DirectProtocol(HttpToolsProtocol):
    """A uvicorn connection that uses offers of direct answers. Other subclasses come after it:
    `class Connection(DirectProtocol, BoundedProtocol)`.
    """

    _offer: _Offer | None = None
    _between_messages = True
    """The parser is between two requests."""
    _last_head = b""
    """The head at the start of the data being parsed."""
    _waiting = b""
    """Received data that waits in the queue."""
    _answered_at = 0.0
    """Time of the last direct answer, seconds of the event loop's clock."""
    max_direct_bytes = MAX_DIRECT_BYTES
    """Longest body that is answered directly: at most the server's `max_body_bytes`."""
    direct_queue: DirectQueue
    """Shared by all connections of a server; set when a connection is made."""

    def data_received(self, data: bytes) -> None:
        if self._offer is None or (not self._waiting and self.direct_queue.may_answer_at_once()):
            self._receive(data)
            return
        if not self._waiting:
            self.direct_queue.put(self, is_routine=self._offer.is_routine)
        self._waiting += data
        if len(self._waiting) > MAX_DIRECT_BYTES:
            self.receive_waiting()

    def receive_waiting(self) -> None:
        """Handle the data that waited in the queue."""
        data, self._waiting = self._waiting, b""
        if data and not self.transport.is_closing():
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        if self._offer is not None:
            while data and (rest := self._answer_directly(data, self._offer)) is not None:
                data = rest
            if not data:
                return
            self._offer = None
        if self._between_messages:
            # Drop the body, which an idle connection would keep in memory.
            self._last_head = data[: data.find(_END_OF_HEAD) + len(_END_OF_HEAD)]
        super().data_received(data)
        self._last_head = b""

    def on_message_begin(self) -> None:
        self._between_messages = False
        super().on_message_begin()
        extensions: dict[str, Any] = {_EXTENSION: functools.partial(self._take_up, self._last_head)}
        self.scope["extensions"] = extensions
        self._last_head = b""  # a later request in the same data has another head

    def on_message_complete(self) -> None:
        self._between_messages = True
        super().on_message_complete()

    def _take_up(self, first_head: bytes, answer: DirectAnswer, is_routine: bool) -> None:
        """`first_head`: head of the request that `answer` is offered for."""
        head = _HEAD.fullmatch(first_head)
        if head is not None:
            # Randomised: thousands of connections may have been opened in the same second.
            seconds = REPEAT_S * random.uniform(0.5, 1.0)
            self._offer = _Offer(head[1], head[3], answer, self.loop.time() + seconds, is_routine)

    def _is_free(self) -> bool:
        """Whether the connection is idle and an answer could be written now."""
        return (
            self._between_messages
            and self.cycle is not None
            and self.cycle.response_complete
            and not self.pipeline
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def _answer_directly(self, data: bytes, offer: _Offer) -> bytes | None:
        """Answer the complete request at the start of `data` if the offer applies to it.

        Returns the data after it, or None if it takes the normal path.
        """
        if not (data.startswith(offer.before_length) and self.loop.time() < offer.until and self._is_free()):
            return None
        begin = len(offer.before_length)
        end = data.find(b"\r", begin, begin + _MAX_LENGTH_DIGITS + 1)
        length = data[begin:end]
        if end < 0 or not length.isdigit() or not data.startswith(offer.after_length, end):
            return None
        if int(length) > self.max_direct_bytes:
            return None
        body_begin = end + len(offer.after_length)
        body_end = body_begin + int(length)
        if body_end > len(data):
            return None
        answer = offer.answer(data[body_begin:body_end])
        if answer is None:
            return None
        head = self.direct_queue.answer_head(self.server_state.default_headers)
        self.transport.write(b"%b%d\r\n\r\n%b" % (head, len(answer), answer))
        self.server_state.total_requests += 1
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._keep_alive_for(self.timeout_keep_alive)
        return data[body_end:]

    def _keep_alive_for(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Called when the keep-alive timer ends. Direct answers do not reset it; it is extended here."""
        left_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self._waiting:  # not idle: its request waits in the queue
            self._keep_alive_for(self.timeout_keep_alive)
        elif left_s > 0:
            self._keep_alive_for(left_s)
        else:
            super().timeout_keep_alive_handler()
