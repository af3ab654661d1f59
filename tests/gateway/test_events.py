"""Event streams are split and checked: nothing is lost, and nothing invalid passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.errors import InvalidAnswerError
from fastserve.gateway.answers import Contents, parse_body
from fastserve.gateway.apis import JSON_LINES, EventKind
from fastserve.gateway.apis.openai import OpenAIApi
from fastserve.gateway.events import MAX_SILENT_BYTES, AnswerStream, EventStream, open_stream

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
MIXED = [
    b": keep-alive\n\n",
    EVENT % b"a",
    EVENT % "é 中 \U0001f600".encode(),
    b"event: message\nid: 7\n: [[1],[2]]\n" + EVENT % b"b",
    EVENT % b"data: [DONE]",
    b'data: {"choices":[],\ndata: "usage":{"total_tokens":3}}\n\n',
    EVENT % b"x" * 50,
]


def make_stream(max_event_bytes: int = 2**20, max_stream_bytes: int = 2**30) -> EventStream:
    return EventStream(max_event_bytes, max_stream_bytes)


def feed_all(stream: EventStream, data: bytes, size: int) -> bytes:
    return b"".join(stream.feed(data[at : at + size]) for at in range(0, len(data), size))


def feed_times(stream: EventStream, piece: bytes, count: int) -> None:
    for _ in range(count):
        stream.feed(piece)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_pass_byte_for_byte_however_they_are_cut(size: int, line_end: bytes) -> None:
    data = (b"".join(MIXED) + DONE).replace(b"\n", line_end)
    stream = make_stream()
    assert feed_all(stream, data, size) == data
    assert stream.is_done
    assert stream.has_data
    assert stream.error is None
    assert stream.finish() == b""


def test_half_an_event_is_held_back() -> None:
    stream = make_stream()
    event = EVENT % b"a"
    assert stream.feed(event + event[:9]) == event
    assert stream.feed(event[9:]) == event
    assert stream.feed(event[:-1]) == b""
    assert stream.finish() == b""
    assert not stream.is_done


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\n"])
def test_a_last_event_without_its_blank_line_counts(end: bytes) -> None:
    stream = make_stream()
    assert stream.feed(EVENT % b"a" + end) == EVENT % b"a"
    assert stream.finish() == end.strip() + b"\n\n"
    assert stream.is_done


def test_lines_of_one_event_may_end_in_different_ways() -> None:
    stream = make_stream()
    data = (EVENT % b"a").strip() + b"\n\r\n" + (EVENT % b"b").strip() + b"\r\n\n" + DONE
    assert stream.feed(data) == data
    assert stream.is_done


@pytest.mark.parametrize("mark", [b"\n", b"\r\n", b"\r"])
def test_data_after_done_is_dropped(mark: bytes) -> None:
    stream = make_stream()
    data = (EVENT % b"data: [DONE]" + DONE + b": bye\n\n" + EVENT % b"late").replace(b"\n", mark)
    passed = stream.feed(data)
    assert passed.replace(b"\r\n", b"\n").replace(b"\r", b"\n") == EVENT % b"data: [DONE]" + DONE


def test_an_error_event_is_seen_and_passed() -> None:
    stream = make_stream()
    error = b'data: {"error":{"message":"gone","type":"service_unavailable_error","param":null,"code":null}}\n\n'
    assert stream.feed(error) == error
    assert stream.error == error.removeprefix(b"data: ").strip()
    assert not stream.has_data


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(b"<html><body>502 Bad Gateway</body></html>\n\n", id="html"),
        pytest.param(b"hello\n\n", id="text"),
        pytest.param(b"data: hello\n\n", id="no json"),
        pytest.param(b'data: {"choices":[{"index":0}\n\n', id="half json"),
        pytest.param(b'data: ["choices"]\n\n', id="a list"),
        pytest.param(b"data: 17\n\n", id="a number"),
        pytest.param(b'data: {"text":"a"}\n\n', id="neither choices nor error"),
        pytest.param(b'data: {"choices":{"0":1}}\n\n', id="choices that are no list"),
        pytest.param(b'data: {"choices":["a"]}\n\n', id="choices that are no objects"),
        pytest.param(b'data: {"error":"broken"}\n\n', id="an error that is no object"),
        pytest.param(b'data: {"choices":[{"x":"\xff\xfe"}]}\n\n', id="no utf-8"),
        pytest.param(b": \xc3(\n\n", id="a comment that is no utf-8"),
        pytest.param(b'data: {"choices":[{"x":' + b"[" * 50_000 + b"\n\n", id="nested too deep"),
        pytest.param(b"data: \x00\x01\x02\n\n", id="binary"),
        pytest.param(b"choices: []\n\n", id="a field that is none"),
        pytest.param(b'data: {"choices":\r[{"index":0}]}\n\n', id="json over two lines that a CR ends"),
        pytest.param(b'data: {"choices":[{"index":0}]}\r<html>\n\n', id="a line that is none behind a CR"),
        pytest.param(b'data: {"choices":[{"index":0,"delta":"text"}]}\n\n', id="a delta that is no object"),
        pytest.param(b'data: {"choices":[{"index":"0","delta":{}}]}\n\n', id="an index that is no number"),
        pytest.param(b'data: {"choices":[{"index":0,"text":{}}]}\n\n', id="a text that is none"),
        pytest.param(b'data: {"choices":[{"index":0}],"choices":[null]}\n\n', id="choices twice, the last ones wrong"),
        pytest.param(b'data: {"choices":[{"index":0}]}{"choices":[]}\n\n', id="two objects"),
    ],
)
@pytest.mark.parametrize("before", [b"", EVENT % b"a", b": alive\n\n"], ids=["first", "after data", "after a comment"])
def test_invalid_events_are_refused(before: bytes, event: bytes) -> None:
    stream = make_stream()
    assert stream.feed(before) == before if before else True
    with pytest.raises(InvalidAnswerError):
        stream.feed(event)


def test_an_event_without_an_end_is_refused_at_its_bound() -> None:
    stream = make_stream(max_event_bytes=1000)
    with pytest.raises(InvalidAnswerError, match="longer than 1000 bytes"):
        feed_times(stream, b"data: " + b"x" * 94, 100)


def test_an_endless_stream_is_refused_at_its_bound() -> None:
    stream = make_stream(max_stream_bytes=10_000)
    with pytest.raises(InvalidAnswerError, match="longer than 10000 bytes"):
        feed_times(stream, EVENT % b"a", 1000)


@pytest.mark.parametrize("filler", [b": keep-alive\n\n", b"\n\n", b"id: 1\n\n"], ids=["comments", "blank lines", "ids"])
def test_a_stream_of_nothing_is_refused_at_its_bound(filler: bytes) -> None:
    stream = make_stream()
    stream.feed(EVENT % b"a")
    piece = filler * 1000
    with pytest.raises(InvalidAnswerError, match="without data"):
        feed_times(stream, piece, MAX_SILENT_BYTES // len(piece) + 2)


def test_keep_alive_comments_between_data_are_no_flood() -> None:
    stream = make_stream()
    for _ in range(300):
        stream.feed(b": keep-alive\n\n" * 500)
        stream.feed(EVENT % b"a")


# ---- JSON lines -------------------------------------------------------------------------------------------------


class Lines(OpenAIApi):
    """Lines with the fields of OpenAI's chunks; one without choices is the last."""

    media_type = JSON_LINES
    plain_errors = True

    def read_event(self, data: bytes) -> EventKind:
        body = parse_body(data, Contents(plain_errors=True))
        return "error" if body.error else "last" if body.choices == [] else "data"


LINES = [b'{"choices":[{"index":%d,"text":"%s"}]}\n' % (at, "é 中".encode() * at) for at in range(3)]
LAST_LINE = b'{"choices":[]}\n'


def make_lines(max_event_bytes: int = 2**20, max_stream_bytes: int = 2**30) -> AnswerStream:
    return open_stream(max_event_bytes, max_stream_bytes, Lines())


@pytest.mark.parametrize("size", [1, 2, 7, 40, 1000])
def test_lines_pass_byte_for_byte_however_they_are_cut(size: int) -> None:
    data = b"".join(b"  " + line for line in LINES) + LAST_LINE
    stream = make_lines()
    passed = b""
    for at in range(0, len(data), size):
        assert not stream.is_done
        passed += stream.feed(data[at : at + size])
    assert passed == data
    assert (stream.is_done, stream.has_data, stream.error, stream.finish()) == (True, True, None, b"")


def test_spaces_between_lines_pass_at_once_and_are_no_data() -> None:
    stream = make_lines()
    assert (stream.feed(b" "), stream.has_data) == (b" ", False)
    assert stream.feed(LINES[0][:9]) == b""
    assert stream.feed(b" ") == b""  # inside a line they are part of it
    with pytest.raises(InvalidAnswerError, match="bytes without data"):
        make_lines().feed(b" " * (MAX_SILENT_BYTES + 1))


def test_a_last_line_without_its_end_counts_and_half_a_line_does_not() -> None:
    stream = make_lines()
    assert stream.feed(LINES[1] + LAST_LINE[:-1]) == LINES[1]
    assert stream.finish() == LAST_LINE
    assert stream.is_done
    cut = make_lines()
    assert cut.feed(LINES[1] + LAST_LINE[:-3]) == LINES[1]
    assert (cut.finish(), cut.is_done) == (b"", False)


def test_lines_after_the_last_are_dropped_and_a_plain_error_is_kept() -> None:
    stream = make_lines()
    assert stream.feed(LINES[0] + LAST_LINE + LINES[1]) == LINES[0] + LAST_LINE
    failed = make_lines()
    line = b'{"error":"gone","code":"worker_lost"}\n'
    assert failed.feed(line) == line
    assert (failed.has_data, failed.is_done, failed.error) == (False, False, line.strip())


@pytest.mark.parametrize(
    "line", [b"\n", b"[]\n", b"data: {}\n", b'{"choices":[{"text":"\xff"}]}\n', b'{"error":{"message":"no string"}}\n']
)
def test_lines_that_clients_cannot_read_are_not_passed_on(line: bytes) -> None:
    with pytest.raises(InvalidAnswerError):
        make_lines().feed(LINES[0] + line)


def test_lines_and_their_streams_have_a_longest_size() -> None:
    with pytest.raises(InvalidAnswerError, match="An event"):
        make_lines(max_event_bytes=10).feed(LINES[2][:11])
    with pytest.raises(InvalidAnswerError, match="stream is longer"):
        make_lines(max_stream_bytes=10).feed(LINES[2])
