"""The answers of Ollama's `/api/chat` and `/api/generate`: one object, or a line of JSON for each new piece of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pydantic_core

from fastserve.errors import FastserveError
from fastserve.openai.answers import DecodedToken, Usage, encode_json
from fastserve.openai.ollama import timestamp
from fastserve.serving.error_shapes import OLLAMA_ERRORS
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.results import JobResult
from fastserve.worker.writers.chat import chat_logprobs

Fields = dict[str, Any]
Shape = Callable[[str, str, list[Fields]], Fields]
"""(text, thinking, whole tool calls) -> fields of an answer"""


def chat_shape(text: str, thinking: str, calls: list[Fields]) -> Fields:
    message: Fields = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def generate_shape(text: str, thinking: str, calls: list[Fields]) -> Fields:
    return {"response": text} | ({"thinking": thinking} if thinking else {})


class _Pieces:
    """Collects parts. A tool call is given out whole, once its last piece has come."""

    def __init__(self) -> None:
        self._call: ToolCallPart | None = None
        self._arguments = ""

    def add(self, parts: Sequence[Part], *, is_last: bool) -> tuple[str, str, list[Fields]]:
        text, thinking, calls = "", "", []
        for part in parts:
            if self._call is not None and not (isinstance(part, ToolCallPart) and part.index == self._call.index):
                calls.append(self._take_call(self._call))
            if isinstance(part, TextPart):
                text += part.text
            elif isinstance(part, ReasoningPart):
                thinking += part.text
            elif isinstance(part, ToolCallPart):
                self._call = self._call or part
                self._arguments += part.arguments
            else:
                raise TypeError(f"this answer format does not support {type(part).__name__}")
        if is_last and self._call is not None:
            calls.append(self._take_call(self._call))
        return text, thinking, calls

    def _take_call(self, call: ToolCallPart) -> Fields:
        try:
            # Arguments that are cut off by the limit of tokens keep what is complete.
            arguments = pydantic_core.from_json(self._arguments or "{}", allow_partial=True)
        except ValueError:
            arguments = {}
        self._call, self._arguments = None, ""
        fields = arguments if isinstance(arguments, dict) else {}
        return {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": fields}}


class OllamaWriter:
    keep_alive = b" "

    def __init__(self, job: Job, model: str, shape: Shape) -> None:
        """`model`: as the client named it."""
        self._job = job
        self._model = model
        self._shape = shape
        self._pieces = _Pieces()
        self._first_s: float | None = None
        """When the first token came, as time.monotonic()."""
        self._finish_reason: str | None = None

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(map(self._line, deltas))

    def _line(self, delta: ChoiceDelta) -> bytes:
        self._first_s = self._first_s or time.monotonic()
        self._finish_reason = delta.finish_reason
        pieces = self._pieces.add(delta.parts, is_last=delta.finish_reason is not None)
        if not any(pieces) and not delta.tokens:
            return b""
        return encode_json(self._head() | self._shape(*pieces) | {"done": False} | _logprobs(delta.tokens)) + b"\n"

    def end(self, usage: Usage) -> bytes:
        return encode_json(self._head() | self._shape("", "", []) | self._last(str(self._finish_reason), usage)) + b"\n"

    def error(self, error: FastserveError) -> bytes:
        return OLLAMA_ERRORS.last_event(error)

    def whole(self, result: JobResult) -> bytes:
        choice = result.runs[0]
        pieces = _Pieces().add(choice.parts, is_last=True)
        last = self._last(str(choice.finish_reason), result.usage)
        return encode_json(self._head() | self._shape(*pieces) | last | _logprobs(choice.tokens))

    def _head(self) -> Fields:
        return {"model": self._model, "created_at": timestamp(time.time())}

    def _last(self, finish_reason: str, usage: Usage) -> Fields:
        """The end, with durations in nanoseconds. A whole answer has all of its time in one of them."""
        started, now = self._job.caller.arrived_s, time.monotonic()
        first = self._first_s or started
        return {
            "done": True,
            "done_reason": "length" if finish_reason == "length" else "stop",
            "total_duration": _ns(now - started),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _ns(first - started),
            "eval_count": usage.completion_tokens,
            "eval_duration": _ns(now - first),
        }


def loaded(model: str, reason: str, shape: Shape) -> Fields:
    """The answer to a request that only loads or unloads a model."""
    head = {"model": model, "created_at": timestamp(time.time())}
    return head | shape("", "", []) | {"done": True, "done_reason": reason}


def _logprobs(tokens: Sequence[DecodedToken] | None) -> Fields:
    return {"logprobs": chat_logprobs(tokens)["content"]} if tokens else {}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
