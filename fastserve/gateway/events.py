"""A worker's event stream: cut into whole events and checked on its way to the client. No I/O here.

Events are passed on byte for byte, and only whole (cut at blank lines): whatever happens to the worker, the client
never holds half an event, and an error event can follow. Each event is parsed once, which costs less than a
microsecond, so that no client is handed one that its SDK cannot read.
"""

from __future__ import annotations

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import parse_body

MAX_SILENT_BYTES = 2**20
"""Most bytes of comments between two data events. Keep-alive comments, one a second, take hours to reach it."""
BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")
"""Ends of a line and of an empty one after it. Lines end in LF, CR LF or CR."""
FIELDS = (b":", b"event:", b"id:", b"retry:")


class EventStream:
    """One stream's state. `feed` takes the bytes as they come, in pieces of any size, in linear time."""

    def __init__(self, max_event_bytes: int, max_stream_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._bytes_left = max_stream_bytes
        self._max_stream_bytes = max_stream_bytes
        self._held = bytearray()
        """The beginning of an event whose end has not come yet."""
        self._silent_bytes = 0
        self.has_data = False
        """A data event other than an error has come."""
        self.is_done = False
        """`[DONE]` has come: nothing after it is looked at."""
        self.error: bytes | None = None
        """The data of an error event."""

    def feed(self, piece: bytes) -> bytes:
        """The whole events that the piece completes; b"" when there are none.

        Raises InvalidAnswerError when they are no events, none that OpenAI's clients can read, or too many.
        """
        size = len(piece)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise InvalidAnswerError(f"The worker's stream is longer than {self._max_stream_bytes} bytes.")
        is_one_line = piece.find(b"\n") == size - 2 and piece.endswith(b"\n\n")
        if is_one_line and piece.startswith(b"data: {") and not self._held and b"\r" not in piece:
            # The usual case, as cheaply as can be.
            self._take(piece[6:-2])
            return piece
        if self._held or not piece.endswith(BLANK_LINES):
            piece = self._hold(piece)
            if not piece:
                return b""
        return self._check(piece)

    def finish(self) -> bytes:
        """The stream has ended. Returns what is still to be passed on: a `[DONE]` without its blank line."""
        rest = bytes(self._held)
        self._held.clear()
        if rest.strip() in (b"data: [DONE]", b"data:[DONE]"):
            self._take(b"[DONE]")
            return rest.strip() + b"\n\n"
        return b""

    def _hold(self, piece: bytes) -> bytes:
        """Keep what comes after the last whole event, and return what comes before."""
        held = self._held
        seen = max(0, len(held) - 3)  # a blank line may have begun in what is held
        held += piece
        cut = max((at + len(mark) for mark in BLANK_LINES if (at := held.rfind(mark, seen)) >= 0), default=0)
        if len(held) - cut > self._max_event_bytes:
            raise InvalidAnswerError(f"An event of the worker's stream is longer than {self._max_event_bytes} bytes.")
        whole = bytes(held[:cut])
        del held[:cut]
        return whole

    def _check(self, events: bytes) -> bytes:
        text = events
        if not events.isascii():
            try:
                events.decode()
            except UnicodeDecodeError as error:
                raise InvalidAnswerError("The worker's stream is not UTF-8.") from error
            # The rest is checked bytewise: no byte of a longer character is a line end or a colon.
        if b"\r" in events:
            text = events.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._silent_bytes += len(events)
        end = 0
        for event in text.split(b"\n\n"):
            end += len(event) + 2
            if event.startswith(b"data:") and b"\n" not in event:
                self._take(event[5:].strip())
            elif event:
                self._take_lines(event)
            if self.is_done:
                # What follows is dropped.
                return events if not text[end:].strip(b"\n") else text[:end]
        if self._silent_bytes > MAX_SILENT_BYTES:
            raise InvalidAnswerError(f"The worker's stream brought {MAX_SILENT_BYTES} bytes without data.")
        return events

    def _take_lines(self, event: bytes) -> None:
        """An event with comments, other fields, or several lines of data."""
        data = []
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif line and not line.startswith(FIELDS):
                raise InvalidAnswerError("The worker's stream has a line that is no event.")
        if data:
            self._take(b"\n".join(data).strip())

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            if not self.has_data and self.error is None:
                raise InvalidAnswerError("The worker's stream has no data.")
            self.is_done = True
            return
        body = parse_body(data)
        if body.error is not None:
            self.error = data
        elif body.choices is None:
            raise InvalidAnswerError("An event of the worker's stream has neither choices nor an error.")
        else:
            self.has_data = True
        self._silent_bytes = 0
