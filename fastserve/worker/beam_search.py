"""Beam search over the logprobs of an engine: the candidates of each step, and those that are finished.

Rules and scores are those of transformers' `generate(num_beams=..., early_stopping=False)`. A step takes from all
continuations of all beams the likeliest ones. Those among the first `width` that end are finished; the likeliest others
become the beams of the next step. The search ends when no beam is better than the worst of `width` finished answers, if
it were compared at its present length.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.engine.contract import FinishReason


@dataclass(frozen=True)
class BeamSettings:
    width: int
    length_penalty: float
    stop_token_ids: frozenset[int]

    @property
    def num_top(self) -> int:
        """Number of continuations of a beam that a step needs: enough for `width` that do not end."""
        return self.width + len(self.stop_token_ids)


@dataclass(frozen=True)
class Beam:
    token_ids: list[int]
    logprob_sum: float


@dataclass(frozen=True)
class FinishedBeam:
    token_ids: list[int]
    score: float
    finish_reason: FinishReason


class BeamSearch:
    def __init__(self, settings: BeamSettings, max_tokens: int) -> None:
        self._settings = settings
        self._max_tokens = max_tokens
        self.beams = [Beam([], 0.0)]
        """Those to continue; empty when the search has ended."""
        self.finished: list[FinishedBeam] = []
        """Best first, at most `width`."""

    def step(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Take a step. `continuations`: for each beam its `num_top` likeliest next tokens with their logprobs."""
        settings = self._settings
        candidates = [
            (beam.logprob_sum + logprob, number, token_id)
            for number, (beam, tokens) in enumerate(zip(self.beams, continuations, strict=True))
            for token_id, logprob in tokens
        ]
        for beam in self._best(candidates):
            reason = self._finish_reason(beam)
            if reason is not None:
                self.finished.append(FinishedBeam(beam.token_ids, self._score(beam), reason))
        self.finished.sort(key=lambda beam: beam.score, reverse=True)
        del self.finished[settings.width :]
        open_ones = self._best([item for item in candidates if item[2] not in settings.stop_token_ids])
        going_on = [beam for beam in open_ones if self._finish_reason(beam) is None]
        self.beams = going_on if self._may_improve(going_on) else []

    def _best(self, candidates: Sequence[tuple[float, int, int]]) -> list[Beam]:
        """The `width` likeliest candidates, each a sum of logprobs, a beam and the token after it."""
        best = heapq.nlargest(self._settings.width, candidates, key=lambda candidate: candidate[0])
        return [Beam([*self.beams[number].token_ids, token_id], total) for total, number, token_id in best]

    def _finish_reason(self, beam: Beam) -> FinishReason | None:
        if beam.token_ids[-1] in self._settings.stop_token_ids:
            return "stop"
        return "length" if len(beam.token_ids) >= self._max_tokens else None

    def _score(self, beam: Beam) -> float:
        return float(beam.logprob_sum / len(beam.token_ids) ** self._settings.length_penalty)

    def _may_improve(self, beams: Sequence[Beam]) -> bool:
        if not beams:
            return False
        return len(self.finished) < self._settings.width or self._score(beams[0]) > self.finished[-1].score
