"""The lines of a batch's files. All functions block: run them in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from fastserve.openai.batches import BatchError
from fastserve.openai.body import shown

MAX_ERRORS = 100
"""Errors of an input file that are reported."""
MAX_LINE_BYTES = 8 * 2**20
MAX_ID_CHARS = 256
READ_LINES = 64
"""Lines that are read at once."""


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class BatchLine:
    custom_id: str
    body: bytes
    """JSON of the request."""


@dataclass(frozen=True)
class CheckedInput:
    num_requests: int
    model: str | None
    """Name of the model, if all requests name the same one."""
    errors: list[BatchError]
    """Errors of the file. If there are any, no request is run."""


def check_input(path: Path, endpoint: str, max_requests: int) -> CheckedInput:
    """Check all lines of an input file before the first is run."""
    errors: list[BatchError] = []
    seen: set[str] = set()
    models: set[str] = set()
    for number, content in _numbered(path):
        problem = _problem(content, endpoint, seen, models)
        if problem is not None and len(errors) < MAX_ERRORS:
            code, message, param = problem
            errors.append(BatchError(code, message, param, number))
        if len(seen) > max_requests:
            message = f"A batch has at most {max_requests} requests (--max-batch-requests). Split the file."
            return CheckedInput(0, None, [BatchError("too_many_requests", message, line=number)])
    if not seen and not errors:
        errors.append(BatchError("empty_file", "The file has no request. Write one JSON object a line."))
    return CheckedInput(len(seen), next(iter(models)) if len(models) == 1 else None, errors)


def _problem(content: bytes, endpoint: str, seen: set[str], models: set[str]) -> tuple[str, str, str | None] | None:
    if len(content) > MAX_LINE_BYTES:
        return "line_too_long", f"A line has at most {MAX_LINE_BYTES} bytes.", None
    try:
        line = _decode_line(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        form = '{"custom_id": "...", "method": "POST", "url": "...", "body": {...}}'
        return "invalid_json_line", f"This line is no request ({_short(error)}). Write {form}.", None
    if not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        return "invalid_custom_id", f"'custom_id' has 1 to {MAX_ID_CHARS} characters.", "custom_id"
    if line.custom_id in seen:
        return "duplicate_custom_id", f"The custom_id {shown(line.custom_id)} is of another line too.", "custom_id"
    seen.add(line.custom_id)
    if line.method != "POST":
        return "invalid_method", f"'method' is {shown(line.method)}; it must be POST.", "method"
    if line.url != endpoint:
        return "mismatched_endpoint", f"'url' is {shown(line.url)}, and the batch's endpoint is {endpoint}.", "url"
    try:
        body = _decode_body(line.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return "invalid_body", f"'body' is no request ({_short(error)}).", "body"
    if body.stream:
        return "invalid_body", "'stream' must be false: the answers of a batch are written whole.", "body.stream"
    models.add(body.model)
    return None


def _short(error: Exception) -> str:
    return str(error)[:200].rstrip(".")


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, content in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if content.strip():
                yield number, content


class InputReader:
    """Reads the requests of a checked file, a few at a time."""

    def __init__(self, path: Path, skip: frozenset[str]) -> None:
        """`skip`: ids of requests that have their answer already."""
        self._lines = _numbered(path)
        self._skip = skip

    def read(self) -> list[BatchLine]:
        """The next requests; empty at the end."""
        while chunk := [_decode_line(content) for _, content in islice(self._lines, READ_LINES)]:
            wanted = [BatchLine(line.custom_id, bytes(line.body)) for line in chunk if line.custom_id not in self._skip]
            if wanted:
                return wanted
        return []


class _Answered(msgspec.Struct):
    custom_id: str


_decode_answered = msgspec.json.Decoder(_Answered).decode


class OutputFile:
    """Lines of answers, written to disk one by one, so that a batch goes on where its process died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0
        self._lock = threading.Lock()

    def recover(self) -> frozenset[str]:
        """Ids of the requests that have their answer here. What follows the last line that is whole is cut off."""
        if not self.path.exists():
            return frozenset()
        ids = set()
        end = 0
        with self.path.open("r+b") as file:
            for content in file:
                try:
                    answered = _decode_answered(content)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    break
                if not content.endswith(b"\n"):
                    break
                end += len(content)
                ids.add(answered.custom_id)
            file.truncate(end)
        self.num_lines = len(ids)
        return frozenset(ids)

    def append(self, line: dict[str, Any]) -> None:
        """Raises OSError if the line cannot be written, and then leaves nothing of it."""
        content = _encode(line) + b"\n"
        with self._lock:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(descriptor, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    while content:
                        content = content[file.write(content) :]
                except OSError:
                    file.truncate(end)
                    raise
            self.num_lines += 1


def answer_line(number: str, custom_id: str, status: int, request_id: str, body: bytes) -> dict[str, Any]:
    """A line of the output file, or of the error file for a status that is not 200."""
    try:
        parsed: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        parsed = body.decode(errors="replace")
    response = {"status_code": status, "request_id": request_id, "body": parsed}
    return {"id": number, "custom_id": custom_id, "response": response, "error": None}


def unanswered_line(number: str, custom_id: str, code: str, message: str) -> dict[str, Any]:
    """A line of the error file for a request that was not run to its end."""
    return {"id": number, "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}
