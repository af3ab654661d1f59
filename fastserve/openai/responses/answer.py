"""The response object and the events of its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.errors import OverloadedError, RequestError
from fastserve.openai.answers import Usage, encode_json
from fastserve.openai.responses.head import ResponseHead
from fastserve.openai.responses.request import ResponsesRequest

Fields = dict[str, Any]

TERMINAL_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})
RUNNING = ("queued", "in_progress")
"""Statuses of responses that have not ended."""
FIRST_EVENTS_OF_BACKGROUND = 2
"""`response.created` and `response.queued`: the API server writes them before a worker has the request."""
_ERROR_CODES = {OverloadedError.type: "rate_limit_exceeded", RequestError.type: "invalid_prompt"}
"""Codes of failed responses, by the type of the error; all others are `server_error`."""


def response_object(
    request: ResponsesRequest, head: ResponseHead, status: str, tools: Sequence[Fields] | None = None
) -> Fields:
    """The object of a response without output. `tools`: those that the model has; None: as the request lists them."""
    text = request.text
    form = (
        {"type": "text"}
        if text is None or text.format is None
        else text.format.model_dump(by_alias=True, exclude_none=True)
    )
    reasoning = request.reasoning
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created_at,
        "completed_at": None,
        "status": status,
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "conversation": None if request.conversation_id is None else {"id": request.conversation_id},
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": head.is_stored,
        "temperature": request.temperature,
        "text": {"format": form, "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": list(request.tools or ()) if tools is None else list(tools),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": request.metadata or {},
    }


def usage_object(usage: Usage) -> Fields:
    given = usage.as_dict()
    return {
        "input_tokens": given["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": given["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": given.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        },
        "total_tokens": given["total_tokens"],
    }


def error_object(error: Mapping[str, Any]) -> Fields:
    """The `error` of a failed response. `error`: OpenAI's error object."""
    return {"code": _ERROR_CODES.get(str(error.get("type")), "server_error"), "message": error["message"]}


def event(kind: str, sequence_number: int, fields: Mapping[str, Any]) -> bytes:
    """An event of a response's stream."""
    return b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        encode_json({"type": kind, "sequence_number": sequence_number, **fields}),
    )


def error_event(error: Mapping[str, Any], sequence_number: int) -> bytes:
    """The last event of a stream that fails before there is a response. `error`: OpenAI's error object.

    It has the fields of the Responses API, and the object in which OpenAI's clients find an error in any stream.
    """
    flat = {name: error.get(name) for name in ("code", "message", "param")}
    return event("error", sequence_number, {**flat, "error": dict(error)})
