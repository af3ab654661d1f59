"""The answer of FastChat's generation routes: records with the whole text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import Usage, encode_json
from fastserve.text.parts import plain_text
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import Echo
from fastserve.worker.results import JobResult
from fastserve.worker.writers.completions import completion_logprobs

END_OF_RECORD = b"\0"


class FastChatWriter:
    """Writes the one choice of a job."""

    keep_alive = b""

    def __init__(self, job: Job, echo: Echo | None) -> None:
        """`echo`: the prompt, if the text begins with it."""
        self._echo = echo
        self._result = JobResult(job)

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        for delta in deltas:
            self._result.add(delta)
        return encode_json(self._record(self._result, None)) + END_OF_RECORD

    def end(self, usage: Usage) -> bytes:
        return self.whole(self._result) + END_OF_RECORD

    def error(self, error: FastserveError) -> bytes:
        return encode_json(error_record(error)) + END_OF_RECORD

    def whole(self, result: JobResult) -> bytes:
        return encode_json(self._record(result, result.runs[0].finish_reason))

    def _record(self, result: JobResult, finish_reason: str | None) -> dict[str, Any]:
        choice, usage = result.runs[0], result.usage
        text, tokens = plain_text(choice.parts), choice.tokens
        if self._echo is not None:
            text, tokens = self._echo.prepend(text, tokens, choice.prompt_logprobs)
        record: dict[str, Any] = {
            "text": text,
            "error_code": 0,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            "finish_reason": finish_reason,
        }
        if tokens is not None:
            record["logprobs"] = completion_logprobs(tokens)
        return record


def error_record(error: FastserveError) -> dict[str, Any]:
    return {"text": error.message, "error_code": error.legacy_code}
