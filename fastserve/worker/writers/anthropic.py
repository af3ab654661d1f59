"""The answer of Anthropic's `/v1/messages`: content blocks, and a stream of named events about one block at a time.

A whole answer is made of the same blocks: its stream folded as Anthropic's clients fold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pydantic_core

from fastserve.errors import FastserveError
from fastserve.openai.answers import KEEP_ALIVE, Usage, encode_json
from fastserve.serving.error_shapes import ANTHROPIC_ERRORS
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.worker.anthropic_request import MessagesJob
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.results import JobResult

Fields = dict[str, Any]


def _text_block(part: TextPart) -> Fields:
    return {"type": "text", "text": ""}


def _thinking_block(part: ReasoningPart) -> Fields:
    return {"type": "thinking", "thinking": "", "signature": ""}


def _tool_block(part: ToolCallPart) -> Fields:
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _text_delta(part: TextPart) -> Fields:
    return {"type": "text_delta", "text": part.text}


def _thinking_delta(part: ReasoningPart) -> Fields:
    return {"type": "thinking_delta", "thinking": part.text}


def _tool_delta(part: ToolCallPart) -> Fields:
    return {"type": "input_json_delta", "partial_json": part.arguments}


_BLOCKS: Mapping[type[Part], tuple[Callable[[Any], Fields], Callable[[Any], Fields]]] = {
    TextPart: (_text_block, _text_delta),
    ReasoningPart: (_thinking_block, _thinking_delta),
    ToolCallPart: (_tool_block, _tool_delta),
}
"""The start of a block by the type of its first part, and the delta of each of its parts."""
_EMPTY_SIGNATURE = {"type": "signature_delta", "signature": ""}


class _Blocks:
    """The events of the content blocks of one answer. Indexes are consecutive, and one block is open at a time."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1
        self._open: tuple[type[Part], int] | None = None
        """Type of the open block's parts, and for a call its index."""
        self.has_calls = False

    def add(self, parts: Sequence[Part]) -> Iterator[Fields]:
        for part in parts:
            start, delta = _BLOCKS[type(part)]
            block = (type(part), part.index if isinstance(part, ToolCallPart) else 0)
            if block != self._open:
                yield from self.close()
                self._open = block
                self._index += 1
                self.has_calls |= isinstance(part, ToolCallPart)
                yield {"type": "content_block_start", "index": self._index, "content_block": start(part)}
            if not isinstance(part, ReasoningPart) or self._shows_thinking:
                yield self._delta(delta(part))

    def close(self) -> Iterator[Fields]:
        if self._open is None:
            return
        if self._open[0] is ReasoningPart:
            yield self._delta(_EMPTY_SIGNATURE)
        self._open = None
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: Fields) -> Fields:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


class AnthropicWriter:
    keep_alive = KEEP_ALIVE

    def __init__(self, job: MessagesJob) -> None:
        self._job = job
        self._blocks = _Blocks(shows_thinking=job.shows_thinking)
        self._has_begun = False
        self._stop: Fields = {}

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(event(payload) for delta in deltas for payload in self._events(delta))

    def _events(self, delta: ChoiceDelta) -> Iterator[Fields]:
        if not self._has_begun:
            self._has_begun = True
            usage = _usage(Usage(self._job.job.prompt_tokens, 0, delta.cached_tokens))
            yield {"type": "message_start", "message": self._message([], _no_stop(), usage)}
        yield from self._blocks.add(delta.parts)
        if delta.finish_reason is not None:
            yield from self._blocks.close()
            self._stop = self._stop_fields(
                delta.finish_reason, delta.stop_string, delta.num_tokens, has_calls=self._blocks.has_calls
            )

    def end(self, usage: Usage) -> bytes:
        last = {"type": "message_delta", "delta": self._stop, "usage": _usage(usage)}
        return event(last) + event({"type": "message_stop"})

    def error(self, error: FastserveError) -> bytes:
        return ANTHROPIC_ERRORS.last_event(error)

    def whole(self, result: JobResult) -> bytes:
        choice = result.runs[0]
        blocks = _Blocks(shows_thinking=self._job.shows_thinking)
        content = _fold([*blocks.add(choice.parts), *blocks.close()])
        stop = self._stop_fields(
            str(choice.finish_reason), choice.stop_string, choice.num_tokens, has_calls=blocks.has_calls
        )
        return encode_json(self._message(content, stop, _usage(result.usage)))

    def _message(self, content: list[Fields], stop: Fields, usage: Fields) -> Fields:
        job = self._job.job
        head = {"id": f"msg_{job.caller.request_id}", "type": "message", "role": "assistant"}
        return {**head, "model": job.answer.model, "content": content, **stop, "usage": usage}

    def _stop_fields(self, finish_reason: str, stop: str | None, num_tokens: int, *, has_calls: bool) -> Fields:
        if finish_reason == "length":
            is_asked = num_tokens >= self._job.max_tokens
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
        elif stop is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}


def _no_stop() -> Fields:
    return {"stop_reason": None, "stop_sequence": None}


def _usage(usage: Usage) -> Fields:
    """The prompt's tokens are divided into those computed and those found in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _fold(events: Sequence[Fields]) -> list[Fields]:
    """The blocks that a stream's events make. Text is joined, and the JSON of a call's input is parsed."""
    blocks: list[Fields] = []
    pieces: list[str] = []
    for payload in events:
        if payload["type"] == "content_block_start":
            blocks.append(payload["content_block"])
            pieces = []
        elif payload["type"] == "content_block_delta":
            pieces.append(next(value for name, value in payload["delta"].items() if name != "type"))
        else:
            _complete(blocks[-1], "".join(pieces))
    return blocks


def _complete(block: Fields, text: str) -> None:
    if block["type"] != "tool_use":
        block[block["type"]] = text
        return
    try:
        # Input that is cut off by the limit of tokens keeps what is complete, as in clients that read the stream.
        block["input"] = pydantic_core.from_json(text or "{}", allow_partial=True)
    except ValueError:
        block["input"] = {}


def event(payload: Fields) -> bytes:
    kind: str = payload["type"]
    return b"event: " + kind.encode() + b"\ndata: " + encode_json(payload) + b"\n\n"
