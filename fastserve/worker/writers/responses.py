"""The answer of /v1/responses: typed events, or one response object.

The parts of a choice become output items: reasoning, messages, function calls. There is one list of items, so those of
the events are those of the final object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from fastserve.errors import FastserveError
from fastserve.openai.answers import KEEP_ALIVE, DecodedToken, Usage, encode_json
from fastserve.openai.responses.answer import (
    FIRST_EVENTS_OF_BACKGROUND,
    error_event,
    error_object,
    event,
    usage_object,
)
from fastserve.openai.responses.head import new_id
from fastserve.text.parts import Part, ReasoningPart, TextPart, ToolCallPart
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.results import JobResult

Fields = dict[str, Any]
Event = tuple[str, Fields]
"""Type of an event, and its fields besides type and sequence number."""
CONTENT_INDEX = 0
"""Messages and reasoning have one part of content."""


class _Item:
    """An output item that is being generated."""

    id_prefix: str

    def __init__(self, index: int, fields: Fields) -> None:
        """`fields`: those of the item besides id and status, without content."""
        self.index = index
        self.pieces: list[str] = []
        self.item: Fields = {"id": new_id(self.id_prefix), **fields, "status": "in_progress"}
        self.where: Fields = {"item_id": self.item["id"], "output_index": index}

    def begin(self) -> list[Event]:
        return [("response.output_item.added", {"output_index": self.index, "item": dict(self.item)})]

    def end(self, status: str) -> list[Event]:
        self.item["status"] = status
        return [("response.output_item.done", {"output_index": self.index, "item": self.item})]


class _Content(_Item):
    """An item whose content is one part."""

    delta_event: str

    def part(self, text: str) -> Fields:
        raise NotImplementedError

    def begin(self) -> list[Event]:
        self.where["content_index"] = CONTENT_INDEX
        return [*super().begin(), ("response.content_part.added", {**self.where, "part": self.part("")})]

    def end(self, status: str) -> list[Event]:
        text = "".join(self.pieces)
        part = self.part(text)
        self.item["content"] = [part]
        done = {**self.where, "text": text}
        if "logprobs" in part:
            done["logprobs"] = part["logprobs"]
        return [
            (f"{self.delta_event}.done", done),
            ("response.content_part.done", {**self.where, "part": part}),
            *super().end(status),
        ]


class _Message(_Content):
    id_prefix = "msg"
    delta_event = "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index, {"type": "message", "role": "assistant", "content": []})
        self.logprobs: list[Fields] = []

    def part(self, text: str) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def add(self, text: str, tokens: Sequence[DecodedToken]) -> list[Event]:
        self.pieces.append(text)
        logprobs = [_logprob(token) for token in tokens]
        self.logprobs = [*self.logprobs, *logprobs] if logprobs else self.logprobs
        return [(f"{self.delta_event}.delta", {**self.where, "delta": text, "logprobs": logprobs})]


class _Reasoning(_Content):
    id_prefix = "rs"
    delta_event = "response.reasoning_text"

    def __init__(self, index: int) -> None:
        super().__init__(index, {"type": "reasoning", "summary": [], "content": []})

    def part(self, text: str) -> Fields:
        return {"type": "reasoning_text", "text": text}

    def add(self, text: str) -> list[Event]:
        self.pieces.append(text)
        return [(f"{self.delta_event}.delta", {**self.where, "delta": text})]


class _Call(_Item):
    """A call of a tool, whose arguments come piece by piece."""

    kind: str
    arguments_field: str

    def __init__(self, index: int, part: ToolCallPart) -> None:
        self.number = part.index
        call = {"type": self.kind, "call_id": part.id or new_id("call"), "name": part.name}
        super().__init__(index, call | {self.arguments_field: ""})

    def add(self, arguments: str) -> list[Event]:
        self.pieces.append(arguments)
        return []


class _FunctionCall(_Call):
    id_prefix = "fc"
    kind = "function_call"
    arguments_field = "arguments"

    def add(self, arguments: str) -> list[Event]:
        return [
            *super().add(arguments),
            ("response.function_call_arguments.delta", {**self.where, "delta": arguments}),
        ]

    def end(self, status: str) -> list[Event]:
        self.item["arguments"] = "".join(self.pieces)
        done = {**self.where, "name": self.item["name"], "arguments": self.item["arguments"]}
        return [("response.function_call_arguments.done", done), *super().end(status)]


class _CustomCall(_Call):
    """A call of a custom tool: its arguments are an object with its input, a text, which is shown once it is whole."""

    id_prefix = "ctc"
    kind = "custom_tool_call"
    arguments_field = "input"

    def end(self, status: str) -> list[Event]:
        text = _custom_input("".join(self.pieces))
        self.item["input"] = text
        return [
            ("response.custom_tool_call_input.delta", {**self.where, "delta": text}),
            ("response.custom_tool_call_input.done", {**self.where, "input": text}),
            *super().end(status),
        ]


def _custom_input(arguments: str) -> str:
    """The input of a custom tool; arguments that are not as they should be are passed on as they are."""
    try:
        return msgspec.json.decode(arguments, type=_CustomArguments).input
    except msgspec.MsgspecError:
        return arguments


class _CustomArguments(msgspec.Struct):
    input: str


ItemT = TypeVar("ItemT", bound=_Item)


class OutputItems:
    """Folds the parts of a choice into items."""

    def __init__(self, custom_tools: frozenset[str]) -> None:
        """`custom_tools`: names of tools whose calls are custom tool calls."""
        self._custom_tools = custom_tools
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._tokens: list[DecodedToken] = []
        """Tokens that wait for the text that they belong to."""

    @property
    def items(self) -> list[Fields]:
        return [item.item for item in self._items]

    def add(self, delta: ChoiceDelta) -> list[Event]:
        """The events of the delta's parts, and at the end of the choice those that end its last item."""
        self._tokens += delta.tokens or ()
        events: list[Event] = []
        for part in delta.parts:
            events += self._add_part(part)
        if delta.parts and not any(isinstance(part, TextPart) for part in delta.parts):
            self._tokens = []  # of reasoning or a call, which show no logprobs
        if delta.finish_reason is not None:
            if not self._items or (self._tokens and isinstance(self._open, _Message)):
                events += self._add_part(TextPart(""))
            events += self.close("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def close(self, status: str) -> list[Event]:
        """End the open item, if there is one."""
        item, self._open = self._open, None
        return [] if item is None else item.end(status)

    def _add_part(self, part: Part) -> list[Event]:
        if isinstance(part, TextPart):
            message, events = self._opened(_Message, _Message)
            tokens, self._tokens = self._tokens, []
            return [*events, *message.add(part.text, tokens)]
        if isinstance(part, ReasoningPart):
            reasoning, events = self._opened(_Reasoning, _Reasoning)
            return [*events, *reasoning.add(part.text)]
        if not isinstance(part, ToolCallPart):
            raise TypeError(f"this answer format does not support {type(part).__name__}")
        return self._add_call(part)

    def _add_call(self, part: ToolCallPart) -> list[Event]:
        call = self._open
        events: list[Event] = []
        if not isinstance(call, _Call) or call.number != part.index:
            kind: type[_Call] = _CustomCall if part.name in self._custom_tools else _FunctionCall
            call, events = self._begin(lambda index: kind(index, part))
        return [*events, *(call.add(part.arguments) if part.arguments else ())]

    def _opened(self, kind: type[ItemT], make: Callable[[int], ItemT]) -> tuple[ItemT, list[Event]]:
        """The open item if it is of this kind, else a new one; and the events of the change."""
        return (self._open, []) if isinstance(self._open, kind) else self._begin(make)

    def _begin(self, make: Callable[[int], ItemT]) -> tuple[ItemT, list[Event]]:
        events = self.close("completed")
        item = make(len(self._items))
        self._items.append(item)
        self._open = item
        return item, [*events, *item.begin()]


class ResponsesWriter:
    keep_alive = KEEP_ALIVE

    def __init__(
        self, response: Fields, custom_tools: frozenset[str] = frozenset(), *, obfuscates: bool = False
    ) -> None:
        """`response`: the object of the response in progress, without output. `custom_tools`: names of tools whose
        calls are custom tool calls. `obfuscates`: whether deltas carry a
        random string that hides their length.
        """
        self._response = response
        self._obfuscates = obfuscates
        self._output = OutputItems(custom_tools)
        self._finish_reason: str | None = None
        self._begun = False
        self._sequence_number = FIRST_EVENTS_OF_BACKGROUND if response["background"] else 0

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            first = () if self._response["background"] else ("response.created",)
            events = [(kind, {"response": self._response}) for kind in (*first, "response.in_progress")]
        for delta in deltas:
            events += self._output.add(delta)
            self._finish_reason = delta.finish_reason
        return self._encode(events)

    def end(self, usage: Usage) -> bytes:
        response = self._ended(usage)
        return self._encode([(f"response.{response['status']}", {"response": response})])

    def error(self, error: FastserveError) -> bytes:
        if not self._begun:
            return error_event(error.body()["error"], self._sequence_number)
        events = self._output.close("incomplete")
        failed = {"status": "failed", "error": error_object(error.body()["error"]), "output": self._output.items}
        return self._encode([*events, ("response.failed", {"response": self._response | failed})])

    def whole(self, result: JobResult) -> bytes:
        choice = result.runs[0]
        self._finish_reason = choice.finish_reason
        self._output.add(
            ChoiceDelta(0, choice.parts, choice.tokens, choice.finish_reason, choice.num_tokens, choice.cached_tokens)
        )
        return encode_json(self._ended(result.usage))

    def _ended(self, usage: Usage) -> Fields:
        if self._finish_reason == "length":
            ending: Fields = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            ending = {"status": "completed", "completed_at": int(time.time())}
        return self._response | ending | {"output": self._output.items, "usage": usage_object(usage)}

    def _encode(self, events: Sequence[Event]) -> bytes:
        out = []
        for kind, fields in events:
            if self._obfuscates and kind.endswith(".delta"):
                fields = fields | {"obfuscation": new_id("")[1 : 33 - len(fields["delta"]) % 32]}
            out.append(event(kind, self._sequence_number, fields))
            self._sequence_number += 1
        return b"".join(out)


def _logprob(token: DecodedToken) -> Fields:
    return _token(token.data, token.logprob) | {
        "top_logprobs": [_token(data, logprob) for *_, data, logprob in token.top]
    }


def _token(data: bytes, logprob: float | None) -> Fields:
    return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}
