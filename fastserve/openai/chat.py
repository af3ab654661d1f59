"""Schema of a /v1/chat/completions request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import (
    MAX_FIELDS,
    Flag,
    Integer,
    Name,
    RequestBounds,
    at_most,
    bounds_of,
    field_error,
    invalid,
    parse_json,
)
from fastserve.openai.content_parts import texts_of_parts
from fastserve.openai.generation import MAX_TOP_LOGPROBS, GenerationRequest
from fastserve.openai.parameters import MESSAGE_FIELDS, KnownFields
from fastserve.openai.prediction import Prediction
from fastserve.openai.template_fields import TemplateFields
from fastserve.openai.tools import ToolFields, check_answers

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_PART_SEPARATOR = "\n"
_LISTS = ("content", "tool_calls")
"""Fields of a message that are lists of parts."""


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    role: Role
    """The chat template gets `developer` as `system`, and `function` as `tool`."""
    content: Any = None
    """A string, or an array of text parts."""
    name: Name | None = None
    """Passed to the chat template; of a message of the role `function` the function that answers."""
    tool_call_id: str | None = None
    """Id of the call that a tool's message answers."""
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    """Calls of an earlier answer, which clients send back."""
    function_call: dict[str, Any] | None = None
    """The old form of a call."""
    reasoning_content: str | None = None
    """The reasoning of an earlier answer. Passed to the chat template; most show it only while tools are called."""
    reasoning: str | None = None
    """The same by its newer name."""


class ChatRequest(TemplateFields, ToolFields, GenerationRequest):
    model_config = ConfigDict(use_attribute_docstrings=True)

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), at_most("max_messages", "messages")]
    """The chat so far."""
    max_completion_tokens: Integer | None = Field(None, ge=1)
    """The newer name of max_tokens, over which it takes precedence."""
    logprobs: Flag | None = None
    """Whether the logprobs of the answer's tokens are returned: the model's own, before all that changes them."""
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """With logprobs: number of likeliest tokens at each place."""
    prediction: Prediction | None = None
    """Text that the answer is expected to contain. Its tokens are drafts of speculative decoding: the answer is the
    same, and comes faster where they are right. Usage has the numbers of accepted and rejected ones."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Passed to the chat template."""

    @field_validator("messages", mode="before")
    @classmethod
    def _count_parts(cls, value: Any, info: ValidationInfo) -> Any:
        max_parts, num_parts = bounds_of(info).max_content_parts, 0
        if not isinstance(value, list) or len(value) > bounds_of(info).max_messages:
            return value  # its own validators refuse it
        for message in value:
            if isinstance(message, dict):
                if len(message) > MAX_FIELDS:
                    raise field_error(f"A message has at most {MAX_FIELDS} fields, not {len(message)}.")
                num_parts += sum(len(message[name]) for name in _LISTS if isinstance(message.get(name), list))
        if num_parts > max_parts:
            raise field_error(
                f"Send at most {max_parts} content parts and tool calls in one request (--max-content-parts), "
                f"not {num_parts}."
            )
        return value

    def check(self) -> None:
        super().check()
        self.check_template_fields(self.messages[-1].role)
        if self.prediction is not None and self.num_runs > 1:
            raise invalid("n", self.num_runs, "With a prediction it may not exceed 1.")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", self.top_logprobs, "It needs logprobs=true.")

    def undeclared(self) -> Iterator[tuple[str, KnownFields, Mapping[str, Any]]]:
        yield from super().undeclared()
        for i, message in enumerate(self.messages):
            yield f"messages.{i}.", MESSAGE_FIELDS, message.model_extra or {}

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def template_messages(self, bounds: RequestBounds) -> list[dict[str, Any]]:
        """The messages as chat templates expect them: content as plain text, role `system` for `developer`."""
        messages = [
            _template_message(message, f"messages.{i}", bounds, self.model) for i, message in enumerate(self.messages)
        ]
        check_answers(messages)
        return messages


def _template_message(message: ChatMessage, where: str, bounds: RequestBounds, model: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if message.role == "function" and not message.name:
        raise InvalidRequestError(
            f"Missing required field '{where}.name': a function's message names the function.",
            param=f"{where}.name",
            code="missing_required_parameter",
        )
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequestError(
            f"Missing required field '{where}.tool_call_id': a tool's message names the call that it answers.",
            param=f"{where}.tool_call_id",
            code="missing_required_parameter",
        )
    out: dict[str, Any] = {"role": role, "content": _text(message, f"{where}.content", model)}
    if message.tool_calls:
        out["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls.{i}", bounds) for i, call in enumerate(message.tool_calls)
        ]
    elif message.function_call is not None:
        out["tool_calls"] = [_tool_call({"function": message.function_call}, f"{where}.function_call", bounds)]
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            out[name] = value
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and message.role == "assistant":
        out |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return out


def _text(message: ChatMessage, where: str, model: str) -> str | None:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return None if message.tool_calls or message.function_call else ""
        raise invalid(where, None, "Give a string, or an array of text parts.")
    if not isinstance(content, list):
        raise invalid(where, content, "Give a string, or an array of text parts.")
    return _PART_SEPARATOR.join(texts_of_parts(content, where, model))


def _tool_call(call: dict[str, Any], where: str, bounds: RequestBounds) -> dict[str, Any]:
    """Parse a call's arguments, which clients send as JSON text and templates expect as an object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(where, call, 'A tool call has a "function" with "name" and "arguments".')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}.function.arguments", bounds)
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
