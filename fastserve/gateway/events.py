"""Streams of a worker, split into whole events and checked before they are relayed. No I/O.

An event is a server-sent event, or a line of JSON, as the API says. Events are relayed byte for byte and only whole. So
the client never gets a part of an event, whatever happens to the worker, and an error event can follow. Each event is
parsed once, in less than a microsecond, so that no client gets one that its SDK cannot read.
"""

from __future__ import annotations

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.apis import JSON_LINES, Api
from fastserve.gateway.apis.openai import OPENAI

MAX_SILENT_BYTES = 2**20
"""Limit on the bytes of comments between two data events. Keep-alive comments, one a second, take hours to reach it."""
BLANK_LINES = (b"\n\n", b"\n\r\n", b"\r\r")
"""A line end followed by an empty line. Lines end in LF, CR LF or CR."""
FIELDS = (b":", b"event:", b"id:", b"retry:")


class AnswerStream:
    """The state of one stream. `feed` takes pieces of any size, in linear time."""

    def __init__(self, max_event_bytes: int, max_stream_bytes: int, api: Api = OPENAI) -> None:
        self._api = api
        self._max_event_bytes = max_event_bytes
        self._bytes_left = max_stream_bytes
        self._max_stream_bytes = max_stream_bytes
        self._held = bytearray()
        """Start of an incomplete event."""
        self._silent_bytes = 0
        self.has_data = False
        """A data event other than an error has come."""
        self.is_done = False
        """The answer is complete: everything after its end (`[DONE]` in OpenAI's API) is dropped."""
        self.error: bytes | None = None
        """The data of an error event."""

    def feed(self, piece: bytes) -> bytes:
        """Returns the events that the piece completes; b"" for none.

        Raises InvalidAnswerError for invalid events, events that the API's clients cannot read, and streams that are
        too long.
        """
        raise NotImplementedError

    def finish(self) -> bytes:
        """End the stream. Returns what is still to be relayed: a last event that lacked its line end, or b""."""
        raise NotImplementedError

    def _count(self, num_bytes: int) -> None:
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise InvalidAnswerError(f"The worker's stream is longer than {self._max_stream_bytes} bytes.")

    def _check_held(self, num_bytes: int) -> None:
        if num_bytes > self._max_event_bytes:
            raise InvalidAnswerError(f"An event of the worker's stream is longer than {self._max_event_bytes} bytes.")

    def _check_silence(self) -> None:
        if self._silent_bytes > MAX_SILENT_BYTES:
            raise InvalidAnswerError(f"The worker's stream brought {MAX_SILENT_BYTES} bytes without data.")

    def _take(self, data: bytes) -> None:
        kind = self._api.read_event(data)
        if kind == "end":
            if not self.has_data and self.error is None:
                raise InvalidAnswerError("The worker's stream has no data.")
            self.is_done = True
            return
        if kind == "error":
            self.error = data
        else:
            self.has_data = True
            self.is_done = kind == "last"
        self._silent_bytes = 0


class EventStream(AnswerStream):
    """A stream of server-sent events, which end at blank lines."""

    def feed(self, piece: bytes) -> bytes:
        size = len(piece)
        self._count(size)
        start = self._api.event_start
        is_one_line = piece.find(b"\n") == size - 2 and piece.endswith(b"\n\n")
        if is_one_line and piece.startswith(start) and not self._held and b"\r" not in piece:
            # Fast path for the usual case.
            self._take(piece[len(start) - 1 : -2])
            return piece
        if self._held or not piece.endswith(BLANK_LINES):
            piece = self._hold(piece)
            if not piece:
                return b""
        return self._check(piece)

    def finish(self) -> bytes:
        rest = bytes(self._held)
        self._held.clear()
        if rest.strip() in (b"data: [DONE]", b"data:[DONE]"):
            self._take(b"[DONE]")
            return rest.strip() + b"\n\n"
        return b""

    def _hold(self, piece: bytes) -> bytes:
        """Append the piece to the held bytes; take out and return the whole events."""
        held = self._held
        seen = max(0, len(held) - 3)  # a blank line may have begun in the held bytes
        held += piece
        cut = max((at + len(mark) for mark in BLANK_LINES if (at := held.rfind(mark, seen)) >= 0), default=0)
        self._check_held(len(held) - cut)
        whole = bytes(held[:cut])
        del held[:cut]
        return whole

    def _check(self, events: bytes) -> bytes:
        text = events
        # The rest works on bytes: in UTF-8 no byte of a multi-byte character is a line end or a colon.
        _check_utf8(events)
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
                return events if not text[end:].strip(b"\n") else text[:end]
        self._check_silence()
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


class LineStream(AnswerStream):
    """A stream of JSON lines. Spaces before a line, which keep the connection alive, pass at once."""

    def feed(self, piece: bytes) -> bytes:
        self._count(len(piece))
        held = self._held
        cut = piece.rfind(b"\n") + 1
        if not cut and not held and not piece.strip(b" "):
            self._silent_bytes += len(piece)
            self._check_silence()
            return piece
        whole = bytes(held) + piece[:cut] if cut else b""
        if cut:
            held.clear()
        held += piece[cut:]
        self._check_held(len(held))
        return self._check(whole)

    def finish(self) -> bytes:
        rest = bytes(self._held).strip()
        self._held.clear()
        if not rest:
            return b""
        try:
            return self._check(rest + b"\n")
        except InvalidAnswerError:
            return b""  # a line that was cut off

    def _check(self, lines: bytes) -> bytes:
        _check_utf8(lines)
        end = 0
        for line in lines.split(b"\n")[:-1]:
            end += len(line) + 1
            if not line.strip():
                raise InvalidAnswerError("The worker's stream has an empty line.")
            self._take(line.strip())
            if self.is_done:
                return lines[:end]
        return lines


def open_stream(max_event_bytes: int, max_stream_bytes: int, api: Api) -> AnswerStream:
    kind = LineStream if api.media_type == JSON_LINES else EventStream
    return kind(max_event_bytes, max_stream_bytes, api)


def _check_utf8(events: bytes) -> None:
    if events.isascii():
        return
    try:
        events.decode()
    except UnicodeDecodeError as error:
        raise InvalidAnswerError("The worker's stream is not UTF-8.") from error
