"""The core of an engine that pools: a queue of texts, steps over some of them, and results of whole requests."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from fastserve.engine.contract import (
    STEP_SECONDS_BOUNDS,
    STEP_SIZE_BOUNDS,
    EngineInfo,
    EngineStats,
    Histogram,
    PoolingRequest,
    PoolingResult,
)
from fastserve.engine.pooling.forward import TextBatch
from fastserve.engine.pooling.model import PoolingModel
from fastserve.engine.pooling.queue import Piece, PoolingQueue, QueuedRequest

DEFAULT_STEP_TOKENS = {"cpu": 1024}
"""Tokens of a step where the user names no number. On a CPU more are no faster per token."""
_DEFAULT_STEP_TOKENS = 16_384
_REFERENCE_LENGTH = 64


class PoolingCore:
    """Called by one thread."""

    def __init__(self, model: PoolingModel, max_step_tokens: int | None, max_step_pieces: int) -> None:
        self.model = model
        tokens = max_step_tokens or DEFAULT_STEP_TOKENS.get(model.device.type, _DEFAULT_STEP_TOKENS)
        self._queue = PoolingQueue(tokens, max_step_pieces)
        self._stats = EngineStats()
        self._step_seconds, self._step_tokens, self._step_sequences = Histogram(), Histogram(), Histogram()
        self._stats.tokens_per_s = self._measure(min(tokens, 1024))
        self.info = EngineInfo(
            architecture=model.architecture,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=model.vocab_size,
            max_model_len=model.max_length,
            block_size=1,
            num_blocks=0,
            eos_token_ids=(),
            num_parameters=model.num_parameters,
            load_s=model.load_s,
            pooling=model.info,
        )

    @property
    def has_work(self) -> bool:
        return self._queue.has_work

    @property
    def stats(self) -> EngineStats:
        stats = self._stats
        stats.num_waiting = self._queue.num_requests
        stats.step_seconds, stats.step_tokens = self._step_seconds.copy(), self._step_tokens.copy()
        stats.step_sequences = self._step_sequences.copy()
        return stats

    def add(self, request: PoolingRequest) -> PoolingResult | None:
        """Queue a request. If it cannot run, return its result at once."""
        problem = self._problem(request)
        if problem is not None:
            return PoolingResult(request.request_id, error=problem)
        self._queue.add(request)
        return None

    def abort(self, request_id: str) -> None:
        if self._queue.remove(request_id):
            self._stats.aborted += 1

    def step(self) -> list[PoolingResult]:
        """Compute the next texts; returns the results of the requests that are complete."""
        pieces = self._queue.take()
        if not pieces:
            return []
        begin = time.perf_counter()
        ordered = sorted(pieces, key=lambda piece: -piece.length)
        rows = self._compute(ordered)
        complete = self._queue.finish(ordered, rows)
        results = [self._result(queued) for queued in complete]
        seconds, tokens = time.perf_counter() - begin, sum(piece.length for piece in pieces)
        stats = self._stats
        stats.steps += 1
        stats.prompt_tokens += tokens
        stats.finished += len(results)
        stats.step_s = seconds
        self._step_seconds.add(seconds, STEP_SECONDS_BOUNDS)
        self._step_tokens.add(tokens, STEP_SIZE_BOUNDS)
        self._step_sequences.add(len(pieces), STEP_SIZE_BOUNDS)
        return results

    def _compute(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        ids = [np.frombuffer(piece.queued.request.token_ids, "<i4", piece.length, 4 * piece.begin) for piece in pieces]
        batch = TextBatch(ids, [piece.first_length for piece in pieces])
        requests = [piece.queued.request for piece in pieces]
        return list(
            self.model.compute(
                batch,
                [request.num_prompt_tokens for request in requests],
                [request.task == "token_embed" for request in requests],
            )
        )

    def _result(self, queued: QueuedRequest) -> PoolingResult:
        request = queued.request
        rows = [row for row in queued.results if isinstance(row, torch.Tensor)]
        if request.task == "token_embed":
            return _as_result(request, self._finish(torch.cat(rows), request), [len(row) for row in rows])
        values = torch.stack(rows)
        if request.piece_counts:
            values = _averaged(values, request.lengths, request.piece_counts)
        if request.task == "classify":
            return _as_result(request, values if request.activate is False else self.model.activate(values))
        vectors = self._finish(values, request)
        if request.task == "similarity":
            left, right = (torch.tensor([pair[side] for pair in request.pairs]) for side in (0, 1))
            return _as_result(request, (vectors[left] * vectors[right]).sum(dim=-1, keepdim=True))
        return _as_result(request, vectors)

    def _finish(self, vectors: torch.Tensor, request: PoolingRequest) -> torch.Tensor:
        """Cut and normalise vectors."""
        if request.dimensions is not None:
            vectors = vectors[:, : request.dimensions]
        normalizes = self.model.settings.normalize if request.normalize is None else request.normalize
        return torch.nn.functional.normalize(vectors, dim=-1) if normalizes or request.task == "similarity" else vectors

    def _problem(self, request: PoolingRequest) -> str | None:
        kind = self.model.settings.kind
        if (request.task == "classify") != (kind == "classify"):
            return f"a model that can {kind} cannot {request.task}"
        longest = self.model.max_length
        if not request.lengths or min(request.lengths) < 1 or max(request.lengths) > longest:
            return f"each text must have 1 to {longest} tokens"
        if 4 * sum(request.lengths) != len(request.token_ids):
            return f"{len(request.token_ids)} bytes are not {sum(request.lengths)} token ids"
        ids = np.frombuffer(request.token_ids, "<i4")
        if ids.min() < 0 or ids.max() >= self.model.vocab_size:
            return f"token ids must be from 0 to {self.model.vocab_size - 1}"
        num_texts = len(request.piece_counts) or len(request.lengths)
        if request.piece_counts and (
            min(request.piece_counts) < 1 or sum(request.piece_counts) != len(request.lengths)
        ):
            return "piece_counts must be positive and add up to the number of pieces"
        if request.first_lengths and len(request.first_lengths) != len(request.lengths):
            return "first_lengths must have a number for each piece"
        if any(not 0 <= index < num_texts for pair in request.pairs for index in pair):
            return f"pairs must have indices from 0 to {num_texts - 1}"
        return None

    def _measure(self, num_tokens: int) -> float:
        """Tokens a second in a step, after one that warms up."""
        length = min(_REFERENCE_LENGTH, self.model.max_length)
        count = max(1, num_tokens // length)
        batch = TextBatch([np.zeros(length, np.int32)] * count, [length] * count)
        for _ in range(2):
            begin = time.perf_counter()
            list(self.model.compute(batch, [0] * count, [False] * count))
            seconds = time.perf_counter() - begin
        return length * count / seconds


def _averaged(rows: torch.Tensor, lengths: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """The average of each text's pieces, by their lengths."""
    weights = torch.tensor(lengths, dtype=torch.float32).unsqueeze(1)
    sizes = list(counts)
    sums = [part.sum(dim=0) for part in (rows * weights).split(sizes)]
    return torch.stack(sums) / torch.stack([part.sum(dim=0) for part in weights.split(sizes)])


def _as_result(request: PoolingRequest, values: torch.Tensor, row_counts: list[int] | None = None) -> PoolingResult:
    array = values.contiguous().numpy().astype("<f4", copy=False)
    return PoolingResult(request.request_id, array.tobytes(), values.shape[-1], row_counts or [])
