"""Answers without a task: for small messages that come by the thousand each second over connections that stay open.

uvicorn parses each header in Python and makes a task, an event and a dozen other objects for each request, and then
every middleware looks at it; a heartbeat is handled in a fraction of that time. So an endpoint may offer a function for
requests like the one that it has just answered: those on the same connection whose head is the same, byte for byte but
for the length of the body. What the parser and all checks made of that head holds for them too. Their bodies go to the
function, which answers at once or leaves them to the usual way. After REPEAT_S at most one goes the usual way again, so
that what checks depend on besides the head (keys that have changed) is not overlooked.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REPEAT_S = 40.0
MAX_DIRECT_BYTES = 64 * 1024
"""Longest request, head included; longer ones take the usual way."""
_EXTENSION = "fastserve.direct"
_HEAD = re.compile(
    rb"(POST [^\r\n]+ HTTP/1\.1\r\n(?:[^\r\n]+\r\n)*?content-length: )(\d+)(\r\n(?:[^\r\n]+\r\n)*\r\n)", re.I
)
_MAX_LENGTH_DIGITS = len(str(MAX_DIRECT_BYTES))

DirectAnswer = Callable[[bytes], bytes | None]
"""From a body to the JSON of an answer with status 200; None: the request takes the usual way. It must not raise."""


def offer_direct_answers(scope: Scope, answer: DirectAnswer) -> None:
    """Called by an endpoint that has let this request through: `answer` may answer those that are like it."""
    offer = scope.get("extensions", {}).get(_EXTENSION)
    if offer is not None:
        offer(answer)


class _Offer(NamedTuple):
    before_length: bytes
    after_length: bytes
    answer: DirectAnswer
    until: float


class DirectProtocol(HttpToolsProtocol):
    """A connection of uvicorn's that takes up such offers. Another subclass with duties of its own goes behind it:
    `class Connection(DirectProtocol, BoundedProtocol)`.
    """

    _offer: _Offer | None = None
    _between_messages = True
    """The parser has no part of a message."""
    _last_piece = b""
    """The data that came last, if a message begins with it."""
    _waiting = b""
    """Data that waits for its turn in the event loop."""

    def data_received(self, data: bytes) -> None:
        if self._offer is None:
            self._receive(data)
            return
        # In its turn, as the tasks of other requests: answered right here, thousands of connections that always have
        # something to read would keep the event loop from ever coming to anything else.
        if not self._waiting:
            self.loop.call_soon(self._receive_waiting)
        self._waiting += data
        if len(self._waiting) > MAX_DIRECT_BYTES:
            self._receive_waiting()

    def _receive_waiting(self) -> None:
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
        self._last_piece = data if self._between_messages and len(data) <= MAX_DIRECT_BYTES else b""
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._between_messages = False
        super().on_message_begin()
        extensions: dict[str, Any] = {_EXTENSION: functools.partial(self._take_up, self._last_piece)}
        self.scope["extensions"] = extensions
        self._last_piece = b""  # a message that begins later in the same piece has another head

    def on_message_complete(self) -> None:
        self._between_messages = True
        super().on_message_complete()

    def _take_up(self, piece: bytes, answer: DirectAnswer) -> None:
        """`piece` begins with the message that `answer` is offered for."""
        head = _HEAD.match(piece)
        if head is not None:
            # Not all at the same time: thousands of connections may have been opened in the same second.
            seconds = REPEAT_S * random.uniform(0.5, 1.0)
            self._offer = _Offer(head[1], head[3], answer, self.loop.time() + seconds)

    def _answer_directly(self, data: bytes, offer: _Offer) -> bytes | None:
        """Answer the whole request that `data` begins with, if it is like the one that the offer was made for, and
        return the data behind it; None: it takes the usual way.
        """
        if not (
            data.startswith(offer.before_length)
            and self._between_messages
            and self.cycle is not None
            and self.cycle.response_complete
            and not self.pipeline
            and not self.flow.write_paused
            and not self.transport.is_closing()
            and self.loop.time() < offer.until
        ):
            return None
        begin = len(offer.before_length)
        end = data.find(b"\r", begin, begin + _MAX_LENGTH_DIGITS + 1)
        length = data[begin:end]
        if end < 0 or not length.isdigit() or not data.startswith(offer.after_length, end):
            return None
        body_begin = end + len(offer.after_length)
        body_end = body_begin + int(length)
        if body_end > len(data):
            return None
        answer = offer.answer(data[body_begin:body_end])
        if answer is None:
            return None
        lines = [b"HTTP/1.1 200 OK"]
        lines += [b"%b: %b" % header for header in self.server_state.default_headers]
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer))
        self.transport.write(b"\r\n".join(lines) + answer)
        self.server_state.total_requests += 1
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        return data[body_end:]
