"""One file for each form of answer: how it is written, streamed and whole.

A writer is made for one answer. Streamed, it turns each batch of deltas into bytes; whole, it folds the same parts into
one body. A form of answer is one class that satisfies `AnswerWriter`, and the route that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.errors import FastserveError
from fastserve.openai.answers import Usage
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.results import JobResult


class AnswerWriter(Protocol):
    """Writes one answer, either by `write` and `end` or `error`, or by `whole`."""

    keep_alive: bytes
    """Sent when nothing came for a while; b"" for nothing."""

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        """The next bytes of the stream; b"" for none. Deltas of one choice come in order."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last bytes of a stream whose choices have all finished."""
        ...

    def error(self, error: FastserveError) -> bytes:
        """The last bytes of a stream that fails after its first bytes."""
        ...

    def whole(self, result: JobResult) -> bytes:
        """The body of an answer that is not streamed."""
        ...
