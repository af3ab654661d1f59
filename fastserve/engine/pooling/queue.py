"""The pieces of texts that wait, and which of them are computed next. No torch here.

Requests take turns, one piece each, so that one with thousands of texts delays nobody else's. Those with a lower
priority value come first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastserve.engine.contract import PoolingRequest


@dataclass(eq=False)
class QueuedRequest:
    request: PoolingRequest
    next_piece: int = 0
    """First piece that has not been taken."""
    num_done: int = 0
    """Pieces whose vectors are there."""
    offset: int = 0
    """Tokens of the pieces that have been taken."""
    turn: int = 0
    results: list[object] = field(default_factory=list)
    """By piece, as the model gives them; filled as they come."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A text, or a part of one that is too long."""

    queued: QueuedRequest
    index: int
    begin: int
    """Its first token among those of the request."""
    length: int

    @property
    def first_length(self) -> int:
        """Number of tokens with token type 0."""
        lengths = self.queued.request.first_lengths
        return lengths[self.index] if lengths else self.length


class PoolingQueue:
    def __init__(self, max_step_tokens: int, max_step_pieces: int) -> None:
        """A piece that is longer than `max_step_tokens` has a step of its own."""
        self._max_tokens = max_step_tokens
        self._max_pieces = max_step_pieces
        self._requests: dict[str, QueuedRequest] = {}
        self._heap: list[tuple[int, int, int, QueuedRequest]] = []
        """(priority, turn, number, request) of those with pieces that have not been taken."""
        self._numbers = itertools.count()
        self._turn = 0
        self.num_waiting = 0
        """Pieces that have not been taken."""

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0

    def add(self, request: PoolingRequest) -> None:
        queued = QueuedRequest(request, turn=self._turn, results=[None] * len(request.lengths))
        self._requests[request.request_id] = queued
        self.num_waiting += len(request.lengths)
        self._push(queued)

    def remove(self, request_id: str) -> bool:
        """Drop a request that was aborted or has failed; whether it was there."""
        queued = self._requests.pop(request_id, None)
        if queued is None:
            return False
        self.num_waiting -= len(queued.request.lengths) - queued.next_piece
        queued.next_piece = len(queued.request.lengths)  # what the heap still has of it is skipped
        return True

    def is_queued(self, queued: QueuedRequest) -> bool:
        """Whether the request has neither ended nor been dropped."""
        return self._requests.get(queued.request.request_id) is queued

    def take(self) -> list[Piece]:
        """The pieces of the next step."""
        pieces: list[Piece] = []
        left = self._max_tokens
        while self._heap and len(pieces) < self._max_pieces:
            _, turn, _, queued = self._heap[0]
            lengths = queued.request.lengths
            if queued.next_piece >= len(lengths):
                heapq.heappop(self._heap)
                continue
            length = lengths[queued.next_piece]
            if length > left and pieces:
                break
            heapq.heappop(self._heap)
            pieces.append(Piece(queued, queued.next_piece, queued.offset, length))
            left -= length
            self._turn = max(self._turn, turn)
            queued.turn = turn + 1
            queued.next_piece += 1
            queued.offset += length
            self.num_waiting -= 1
            if queued.next_piece < len(lengths):
                self._push(queued)
        return pieces

    def finish(self, pieces: Sequence[Piece], results: Sequence[object]) -> list[QueuedRequest]:
        """Note the results of a step; returns the requests that are complete, which leave the queue."""
        complete = []
        for piece, result in zip(pieces, results, strict=True):
            queued = piece.queued
            queued.results[piece.index] = result
            queued.num_done += 1
            if queued.num_done == len(queued.results) and self.is_queued(queued):
                del self._requests[queued.request.request_id]
                complete.append(queued)
        return complete

    def _push(self, queued: QueuedRequest) -> None:
        heapq.heappush(self._heap, (queued.request.priority, queued.turn, next(self._numbers), queued))
