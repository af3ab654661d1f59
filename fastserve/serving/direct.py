"""Answers without a task: for small messages that come by the thousand each second over connections that stay open.

uvicorn parses each header in Python and makes a task, an event and a dozen other objects for each request, and then
every middleware looks at it; a heartbeat is handled in a fraction of that time. So an endpoint may offer a function for
requests like the one that it has just answered: those on the same connection whose head is the same, byte for byte but
for the length of the body. What the parser and all checks made of that head holds for them too. Their bodies go to the
function, which answers at once or leaves them to the usual way. After REPEAT_S at most one goes the usual way again, so
that what checks depend on besides the head (keys that have changed) is not overlooked.

When many requests come at the same time they are answered in turns (`DirectQueue`): questions that somebody waits for
before routine messages, and these a slice at a time, so that a crowd of them does not keep a question waiting.
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
"""Longest body; longer ones take the usual way."""
MAX_SLICE_S = 0.5e-3
"""How long routine messages are answered before the event loop looks for questions again."""
MAX_ANSWERED_AT_ONCE = 4
"""Requests that are answered where they are read, until the queue had its turn."""
_EXTENSION = "fastserve.direct"
_END_OF_HEAD = b"\r\n\r\n"
_HEAD = re.compile(
    rb"(POST [^\r\n]+ HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*?content-length: )(\d+)(\r\n(?:[^\r\n]+\r\n)*\r\n)", re.I
)
_MAX_LENGTH_DIGITS = len(str(MAX_DIRECT_BYTES))

DirectAnswer = Callable[[bytes], bytes | None]
"""From a body to the JSON of an answer with status 200; None: the request takes the usual way. It must not raise."""


def offer_direct_answers(scope: Scope, answer: DirectAnswer, *, is_routine: bool = False) -> None:
    """Called by an endpoint that has let this request through: `answer` may answer those that are like it.

    Nobody waits for the answers to routine requests, so others are answered first.
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
    """Connections of one server whose requests wait for their turn; each stands in it once at most.

    A few requests are answered at once, which saves a pass of the event loop. All that come behind them wait for their
    turn, as the tasks of other requests do: answered where they are read, thousands of connections that always have
    something to read would keep the event loop from ever coming to anything else.
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
        """Whether a request that has just been read need not wait; it counts as answered then."""
        if self._is_scheduled or not self._num_at_once_left:
            return False
        self._num_at_once_left -= 1
        return True

    def put(self, connection: DirectProtocol, *, is_routine: bool) -> None:
        """`receive_waiting` of the connection is called soon."""
        (self._routine if is_routine else self._urgent).append(connection)
        if not self._is_scheduled:
            self._schedule()

    def answer_head(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """Head of an answer up to the value of its last header, the length. uvicorn makes the list anew each second."""
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
            # Answers are sent when this pass of the event loop ends: routine messages wait for the next one. They do
            # so once, or questions that never end would keep them waiting for ever.
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
    """A connection of uvicorn's that takes up such offers. Another subclass with duties of its own goes behind it:
    `class Connection(DirectProtocol, BoundedProtocol)`.
    """

    _offer: _Offer | None = None
    _between_messages = True
    """The parser has no part of a message."""
    _last_head = b""
    """The head that the data began with, while the parser reads them."""
    _waiting = b""
    """Data that waits for its turn in the event loop."""
    _answered_at = 0.0
    """When the last direct answer was sent, by the event loop's clock."""
    max_direct_bytes = MAX_DIRECT_BYTES
    """Longest body that is answered directly: no longer than the usual way would take."""
    direct_queue: DirectQueue
    """Whoever makes connections gives all of them the same one."""

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
        """Answer what came when it was not this connection's turn."""
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
            # Without its body, which an idle connection would keep.
            self._last_head = data[: data.find(_END_OF_HEAD) + len(_END_OF_HEAD)]
        super().data_received(data)
        self._last_head = b""

    def on_message_begin(self) -> None:
        self._between_messages = False
        super().on_message_begin()
        extensions: dict[str, Any] = {_EXTENSION: functools.partial(self._take_up, self._last_head)}
        self.scope["extensions"] = extensions
        self._last_head = b""  # a message that begins later in the same piece has another one

    def on_message_complete(self) -> None:
        self._between_messages = True
        super().on_message_complete()

    def _take_up(self, first_head: bytes, answer: DirectAnswer, is_routine: bool) -> None:
        """`first_head` is of the message that `answer` is offered for."""
        head = _HEAD.fullmatch(first_head)
        if head is not None:
            # Not all at the same time: thousands of connections may have been opened in the same second.
            seconds = REPEAT_S * random.uniform(0.5, 1.0)
            self._offer = _Offer(head[1], head[3], answer, self.loop.time() + seconds, is_routine)

    def _is_free(self) -> bool:
        """Whether the connection waits for a request, and an answer could be written now."""
        return (
            self._between_messages
            and self.cycle is not None
            and self.cycle.response_complete
            and not self.pipeline
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def _answer_directly(self, data: bytes, offer: _Offer) -> bytes | None:
        """Answer the whole request that `data` begins with, if it is like the one that the offer was made for, and
        return the data behind it; None: it takes the usual way.
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
        """Called when the timer ends. Direct answers leave it alone, and it runs on from the last of them."""
        left_s = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self._waiting:  # the connection is not idle: its request waits for its turn
            self._keep_alive_for(self.timeout_keep_alive)
        elif left_s > 0:
            self._keep_alive_for(left_s)
        else:
            super().timeout_keep_alive_handler()
