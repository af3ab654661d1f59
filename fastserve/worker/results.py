"""Accumulates the deltas of a request: content of its choices, token counts for usage, and the best choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastserve.engine.contract import TokenLogprob
from fastserve.engine.speculation.prediction import Prediction
from fastserve.openai.answers import DecodedToken, Usage
from fastserve.text.parts import Part
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job


@dataclass
class ChoiceResult:
    """Accumulated deltas of one choice. `parts` are not joined: each answer format joins them in its own way."""

    index: int
    parts: list[Part] = field(default_factory=list)
    tokens: list[DecodedToken] | None = None
    finish_reason: str | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    logprob_sum: float = 0.0
    prompt_logprobs: list[TokenLogprob] | None = None
    stop_string: str | None = None
    token_ids: list[int] | None = None
    """None if they were not requested."""
    weight_versions: Sequence[str] = ()

    def add(self, delta: ChoiceDelta) -> None:
        self.parts += delta.parts
        if delta.tokens is not None:
            self.tokens = self.tokens or []
            self.tokens += delta.tokens
        if delta.token_ids is not None:
            self.token_ids = (self.token_ids or []) + delta.token_ids
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.count(delta)

    def count(self, delta: ChoiceDelta) -> None:
        """Add only what usage and the ranking of best_of need, not the content."""
        self.finish_reason = delta.finish_reason
        self.num_tokens = delta.num_tokens
        self.cached_tokens = delta.cached_tokens
        self.reasoning_tokens = delta.reasoning_tokens
        self.logprob_sum = delta.logprob_sum
        self.stop_string = delta.stop_string
        self.weight_versions = delta.weight_versions

    @property
    def mean_logprob(self) -> float:
        """Mean logprob of a token, including the stop token."""
        return self.logprob_sum / max(1, self.num_tokens)


def extra_fields(choice: ChoiceResult | ChoiceDelta, *, has_token_ids: bool) -> dict[str, Any]:
    """Fields of a choice, or of its part of a stream, that only some have: the ids of its tokens, and the versions of
    the weights that computed them, if there are several."""
    fields: dict[str, Any] = {}
    if has_token_ids:
        fields["token_ids"] = choice.token_ids
    if choice.weight_versions:
        fields["weight_versions"] = list(choice.weight_versions)
    return fields


class JobResult:
    """Accumulated deltas of a job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.runs = [ChoiceResult(index) for index in range(len(job.prompts) * job.num_runs)]
        """All generated choices."""
        self._prediction = None if job.predicted_ids is None else Prediction(job.predicted_ids, 0)
        self._answer_ids: list[int] = []
        """Tokens of the answer of a job with a prediction, which has one choice."""

    def add(self, delta: ChoiceDelta) -> None:
        self.runs[delta.choice].add(delta)
        self._compare(delta)

    def count(self, delta: ChoiceDelta) -> None:
        self.runs[delta.choice].count(delta)
        self._compare(delta)

    def _compare(self, delta: ChoiceDelta) -> None:
        """Compare the answer with its prediction."""
        if self._prediction is not None:
            self._answer_ids += delta.token_ids or ()
            self._prediction.follow(self._answer_ids)

    @property
    def choices(self) -> list[ChoiceResult]:
        """The choices to return, best first: of each prompt, the runs with the highest mean logprob.

        Their indices are those of the answer. Runs with equal means keep their order.
        """
        job = self._job
        if job.num_runs == job.num_choices:
            return [self.runs[index] for index in job.choices]
        returned: list[ChoiceResult] = []
        for at in range(0, len(self.runs), job.num_runs):
            best = sorted(self.runs[at : at + job.num_runs], key=lambda run: run.mean_logprob, reverse=True)
            returned += best[: job.num_choices]
        return [replace(choice, index=index) for index, choice in enumerate(returned)]

    @property
    def usage(self) -> Usage:
        # A prompt is computed once for all of its choices, so its tokens and its cached tokens count once.
        firsts = {index // self._job.num_runs: self.runs[index] for index in reversed(self._job.choices)}
        cached = sum(run.cached_tokens for run in firsts.values())
        accepted, rejected = None, None
        if self._prediction is not None and self._job.predicted_ids is not None:
            accepted = self._prediction.num_matched
            rejected = len(self._job.predicted_ids) - accepted
        num_tokens = sum(run.num_tokens for run in self.runs)
        reasoning = sum(run.reasoning_tokens for run in self.runs) if self._job.answer.counts_reasoning else None
        return Usage(self._job.prompt_tokens, num_tokens, cached, accepted, rejected, reasoning)


class RunningUsage:
    """The usage of an answer so far, of which each delta changes a little."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._firsts = {index // job.num_runs: index for index in reversed(job.choices)}
        self._last: dict[int, ChoiceDelta] = {}
        self._num_tokens = 0
        self._num_cached = 0
        self._num_reasoning = 0

    def count(self, delta: ChoiceDelta) -> Usage:
        last = self._last.get(delta.choice)
        self._last[delta.choice] = delta
        self._num_tokens += delta.num_tokens - (0 if last is None else last.num_tokens)
        if self._firsts[delta.choice // self._job.num_runs] == delta.choice:  # as in the usage of the whole answer
            self._num_cached += delta.cached_tokens - (0 if last is None else last.cached_tokens)
        self._num_reasoning += delta.reasoning_tokens - (0 if last is None else last.reasoning_tokens)
        reasoning = self._num_reasoning if self._job.answer.counts_reasoning else None
        return Usage(self._job.prompt_tokens, self._num_tokens, self._num_cached, reasoning_tokens=reasoning)
