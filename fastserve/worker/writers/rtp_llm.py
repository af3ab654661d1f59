"""The answer of rtp-llm's `POST /`: {"response", "finished", "aux_info"}; in a stream, each event has the whole text so
far, or with return_incremental the next text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastserve.errors import FastserveError, OverloadedError, RequestError
from fastserve.openai.answers import Usage, encode_json
from fastserve.text.parts import plain_text
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.results import ChoiceResult, JobResult
from fastserve.worker.rtp_llm_request import AnswerShape

_DONE = b"data:[done]\r\n\r\n"
_CONCURRENCY_LIMIT, _INPUT_FORMAT, _LONG_PROMPT, _UNKNOWN, _UNSUPPORTED = 409, 507, 511, 514, 515


class RtpLlmWriter:
    keep_alive = b":\r\n\r\n"

    def __init__(self, job: Job, shape: AnswerShape) -> None:
        self._job = job
        self._shape = shape
        self._result = JobResult(job)
        self._new: dict[int, str] = {}
        """Text of each choice since the last event."""

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        for delta in deltas:
            self._result.add(delta)
            self._new[delta.choice] = self._new.get(delta.choice, "") + plain_text(delta.parts)
        event = b"data:" + encode_json(self._answer(self._result, self._shape.is_incremental)) + b"\r\n\r\n"
        self._new.clear()
        return event

    def end(self, usage: Usage) -> bytes:
        return _DONE

    def error(self, error: FastserveError) -> bytes:
        return b"data:" + encode_json(error_body(error)) + b"\r\n\r\n"

    def whole(self, result: JobResult) -> bytes:
        return encode_json(self._answer(result, is_incremental=False))

    def _answer(self, result: JobResult, is_incremental: bool) -> dict[str, Any]:
        num = self._job.num_runs
        runs = [result.runs[at : at + num] for at in range(0, len(result.runs), num)]
        answers = [self._of_prompt(at, choices, is_incremental) for at, choices in enumerate(runs)]
        return {"response_batch": answers} if self._shape.is_batch else answers[0]

    def _of_prompt(self, at: int, choices: Sequence[ChoiceResult], is_incremental: bool) -> dict[str, Any]:
        texts = [self._new.get(choice.index, "") if is_incremental else plain_text(choice.parts) for choice in choices]
        info = [self._aux_info(at, choice) for choice in choices]
        finished = all(choice.finish_reason is not None for choice in choices)
        if self._shape.has_sequences:
            return {"response": texts, "finished": finished, "aux_info": info}
        return {"response": texts[0], "finished": finished, "aux_info": info[0]}

    def _aux_info(self, at: int, choice: ChoiceResult) -> dict[str, Any]:
        return {
            "cost_time": round((time.monotonic() - self._job.caller.arrived_s) * 1000, 3),
            "iter_count": choice.num_tokens,
            "prefix_len": 0,
            "input_len": len(self._job.prompts[at].token_ids),
            "reuse_len": choice.cached_tokens,
            "output_len": choice.num_tokens,
        }


def error_body(error: FastserveError) -> dict[str, Any]:
    """rtp-llm's error, with OpenAI's beside it."""
    if isinstance(error, OverloadedError):
        code = _CONCURRENCY_LIMIT
    elif error.code == "context_length_exceeded":
        code = _LONG_PROMPT
    elif error.code == "unsupported_parameter":
        code = _UNSUPPORTED
    else:
        code = _INPUT_FORMAT if isinstance(error, RequestError) else _UNKNOWN
    body = error.body()
    return {"error_code": code, "message": body["message"], "error": body["error"]}
