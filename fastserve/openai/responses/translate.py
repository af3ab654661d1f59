"""A Responses request as the fields of a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import RequestBounds, shown
from fastserve.openai.responses.head import ResponseHead
from fastserve.openai.responses.items import ItemTranslator
from fastserve.openai.responses.request import PASSED_ON, ResponsesRequest, TextFormat
from fastserve.openai.responses.tools import chat_tools

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}


@dataclass(frozen=True)
class ChatFields:
    fields: dict[str, Any]
    names: Mapping[str, str]
    """Paths in the Responses request, for errors, by paths in the chat request."""
    tools: Sequence[dict[str, Any]]
    """The tools that the model has, as the answer lists them."""
    custom_tools: frozenset[str]
    """Names of those that are custom tools."""


def to_chat(request: ResponsesRequest, bounds: RequestBounds, head: ResponseHead | None) -> ChatFields:
    """Translate a request. `head`: the API server's, which has resolved what refers to its store; None: there is none.

    Raises InvalidRequestError and UnsupportedParameterError.
    """
    if head is None:
        _refuse_state(request)
    items = ItemTranslator(bounds, 0 if head is None else head.num_prior_items)
    if request.instructions is not None:
        items.instruct(request.instructions, "instructions")
    items.add_all(request.input)
    tools = chat_tools(request.tools, request.tool_choice)
    fields: dict[str, Any] = {"model": request.model, "messages": items.messages, "stream": request.stream}
    extra = request.model_extra or {}
    fields |= {name: extra[name] for name in PASSED_ON if name in extra}
    fields |= dict.fromkeys(request.unknown)  # the worker counts and logs their names
    fields |= {name: getattr(request, name) for name in ("temperature", "top_p", "parallel_tool_calls")}
    fields["max_completion_tokens"] = request.max_output_tokens
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.text is not None and request.text.format is not None:
        fields["response_format"] = _response_format(request.text.format)
    names = {**_NAMES, **items.names, **tools.names}
    return ChatFields(fields | tools.fields, names, tools.offered, tools.custom)


def _refuse_state(request: ResponsesRequest) -> None:
    """Refuse fields that refer to a store of responses."""
    given = {
        "previous_response_id": request.previous_response_id,
        "conversation": request.conversation_id,
        "background": request.background or None,
    }
    for name, value in given.items():
        if value is not None:
            raise UnsupportedParameterError(
                f"'{name}' is not supported by this server, which keeps no responses (given: {shown(value)}). Leave it "
                "out and send all items, or start the API server with --responses-store PATH.",
                param=name,
            )


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.name is None:
        raise InvalidRequestError(
            "Missing required field 'text.format.name'.", param="text.format.name", code="missing_required_parameter"
        )
    given = {"name": form.name, "schema": form.schema_, "strict": form.strict, "description": form.description}
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if value is not None}}
