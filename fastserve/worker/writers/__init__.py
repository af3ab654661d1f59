"""One file for each answer format, which writes it streamed and whole.

A writer is made for one answer. For a stream it turns each batch of deltas into bytes; for a whole answer it joins the
same parts into one body. A new format is a class that satisfies `AnswerWriter`, and a route that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.errors import FastserveError
from fastserve.openai.answers import Usage
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.results import JobResult


class AnswerWriter(Protocol):
    """Writes one answer: a stream by `write`, then `end` or `error`; a whole answer by `whole`."""

    keep_alive: bytes
    """Sent in a silent stream; b"" to send nothing."""

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        """The next bytes of the stream; may be empty. Deltas of one choice come in order."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The last bytes of a stream after all choices have finished."""
        ...

    def error(self, error: FastserveError) -> bytes:
        """The last bytes of a stream that fails after it has begun."""
        ...

    def whole(self, result: JobResult) -> bytes:
        """The body of an answer that is not streamed."""
        ...
