"""Requests of Anthropic's Messages API in the fields of a chat request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.answers import encode_json
from fastserve.openai.anthropic import WITHOUT_EFFECT, CountTokensRequest, MessagesRequest
from fastserve.openai.body import RequestBounds, invalid, read_fields, renamed, shown, validate
from fastserve.worker.caller import Caller
from fastserve.worker.jobs import Job, JobMaker

RequestT = TypeVar("RequestT", bound=CountTokensRequest)
Fields = dict[str, Any]

_LONG_FIELDS = frozenset({"messages", "system", "tools"})
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "ctx": "user", "msg": "user"}
"""Roles of a chat by Anthropic's; some clients call turns of the user `ctx` and `msg`."""
_THEIR_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""Names of Anthropic for those of a chat request."""
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_CHOICE_REMEDY = 'Give {"type": "auto"}, {"type": "any"}, {"type": "none"}, or {"type": "tool", "name": "..."}.'
_FORMAT_REMEDY = 'Give {"type": "json_schema", "schema": {...}}.'
MAX_EFFORT_CHARS = 32


@dataclass(frozen=True)
class MessagesJob:
    job: Job
    max_tokens: int
    """The client's max_tokens, which the context may lower."""
    shows_thinking: bool
    """Whether the answer has the text of thinking; else its blocks are empty."""


def make_job(jobs: JobMaker, body: bytes, caller: Caller) -> MessagesJob:
    """Raises RequestError."""
    request = _parse(MessagesRequest, body, jobs.settings.bounds)
    options = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences or None,
        "stream": request.stream,
    }
    job = _make(jobs, to_chat(request), caller, options)
    return MessagesJob(job, request.max_tokens, (request.thinking or {}).get("display") != "omitted")


def count_tokens(jobs: JobMaker, body: bytes, caller: Caller) -> int:
    """Tokens of the prompt that a request makes. Raises RequestError."""
    request = _parse(CountTokensRequest, body, jobs.settings.bounds)
    return _make(jobs, to_chat(request), caller).prompt_tokens


def _parse(kind: type[RequestT], body: bytes, bounds: RequestBounds) -> RequestT:
    return validate(kind, read_fields(body, bounds, kind.model_fields, _LONG_FIELDS), bounds)


def _make(jobs: JobMaker, chat: ChatFields, caller: Caller, options: Mapping[str, Any] | None = None) -> Job:
    given = {**chat.fields, **(options or {})}
    try:
        return jobs.chat_from_fields({name: value for name, value in given.items() if value is not None}, caller)
    except InvalidRequestError as error:
        raise renamed(error, chat.names) from error


@dataclass(frozen=True)
class ChatFields:
    fields: Fields
    """Those of the chat request that make the prompt and the form of the answer."""
    names: Mapping[str, str]
    """Paths in Anthropic's request, for errors, by paths in `fields`."""


def to_chat(request: CountTokensRequest) -> ChatFields:
    """Raises InvalidRequestError."""
    messages = _Messages()
    if request.system:
        messages.add("system", "system", _texts(request.system, "system"))
    for at, message in enumerate(request.messages):
        messages.read(message, f"messages.{at}")
    fields: Fields = {"model": request.model, "messages": messages.chat}
    if messages.chat[-1]["role"] == "assistant" and not messages.chat[-1].get("tool_calls"):
        # The answer goes on with the text of a last turn of the assistant.
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.mcp_servers:
        raise UnsupportedParameterError(
            "'mcp_servers' is not supported: this server calls no others. Give their tools as 'tools'.",
            param="mcp_servers",
        )
    if request.thread is not None:
        raise UnsupportedParameterError(
            "'thread' is not supported: this server keeps no messages. Send all of them with each request.",
            param="thread",
        )
    fields |= _tools(request)
    for at in range(len(request.tools or ())):
        messages.names[f"tools.{at}.function"] = f"tools.{at}"
        messages.names[f"tools.{at}.function.parameters"] = f"tools.{at}.input_schema"
    fields |= _thinking(request.thinking or {})
    fields |= _output(request)
    fields |= {name: None for name in request.model_extra or {} if name not in WITHOUT_EFFECT}
    return ChatFields(fields, {**_THEIR_NAMES, **messages.names})


# ---- messages ---------------------------------------------------------------------------------------------------


@dataclass
class _Messages:
    """Messages of a chat, made of Anthropic's turns."""

    chat: list[Fields] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Paths in Anthropic's request by paths of the chat's messages."""
    _tool_ids: set[str] = field(default_factory=set)
    """Ids of all calls so far, which results may refer to."""

    def add(self, where: str, role: str, content: Any, **more: Any) -> str:
        """Add what the request has at `where`; returns the message's own path."""
        path = f"messages.{len(self.chat)}"
        self.names[path] = where
        self.chat.append({"role": role, "content": content, **more})
        return path

    def read(self, message: Mapping[str, Any], where: str) -> None:
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise invalid(f"{where}.role", role, 'Give "user", "assistant" or "system".')
        turn, content, where = where, message.get("content"), f"{where}.content"
        if isinstance(content, str):
            self.add(turn, _ROLES[role], content)
        elif not isinstance(content, list):
            raise invalid(where, content, "Give a string, or an array of blocks.")
        elif role == "assistant":
            self._read_assistant(content, turn)
        elif role == "system":
            self.add(turn, "system", _texts(content, where))
        else:
            self._read_user(content, turn)

    def _read_user(self, blocks: list[Any], turn: str) -> None:
        """Results of tools are messages of their own, before or between those of the user."""
        parts: list[Fields] = []
        for at, block in enumerate(blocks):
            place = f"{turn}.content.{at}"
            if _type(block, place) != "tool_result":
                parts += _text_parts(block, place)
                continue
            if parts:
                self.add(turn, "user", parts)
                parts = []
            self._read_result(block, place)
        if parts or not blocks:
            self.add(turn, "user", parts)

    def _read_result(self, block: Mapping[str, Any], where: str) -> None:
        tool_id = block.get("tool_use_id")
        if not isinstance(tool_id, str) or tool_id not in self._tool_ids:
            raise invalid(f"{where}.tool_use_id", tool_id, "No tool_use block of the turns before it has this id.")
        content = block.get("content")
        parts = [] if content is None else _texts(content, f"{where}.content")
        if block.get("is_error") is True:
            parts = [_text_part("Error:"), *parts]
        path = self.add(where, "tool", parts, tool_call_id=tool_id)
        self.names[f"{path}.tool_call_id"] = f"{where}.tool_use_id"

    def _read_assistant(self, blocks: list[Any], turn: str) -> None:
        parts: list[Fields] = []
        thoughts: list[str] = []
        calls: list[Fields] = []
        places: list[str] = []
        for at, block in enumerate(blocks):
            place = f"{turn}.content.{at}"
            kind = _type(block, place)
            if kind == "thinking":
                thoughts.append(_string(block, "thinking", place))
            elif kind == "tool_use":
                calls.append(self._read_call(block, place))
                places.append(place)
            elif kind != "redacted_thinking":  # made for another server, which alone can read it
                parts += _text_parts(block, place)
        more: Fields = {"tool_calls": calls} if calls else {}
        if thoughts:
            more["reasoning_content"] = "\n".join(thoughts)
        path = self.add(turn, "assistant", parts or (None if calls else ""), **more)
        for number, place in enumerate(places):
            call = f"{path}.tool_calls.{number}"
            self.names |= {call: place, f"{call}.function": place, f"{call}.function.arguments": f"{place}.input"}

    def _read_call(self, block: Mapping[str, Any], where: str) -> Fields:
        tool_id, name, arguments = _string(block, "id", where), _string(block, "name", where), block.get("input")
        if not isinstance(arguments, dict):
            raise invalid(f"{where}.input", arguments, "Give an object, the arguments of the call.")
        self._tool_ids.add(tool_id)
        function = {"name": name, "arguments": encode_json(arguments).decode()}
        return {"id": tool_id, "type": "function", "function": function}


def _texts(content: Any, where: str) -> list[Fields]:
    """Text parts of a string, or of blocks that are text."""
    if isinstance(content, str):
        return [_text_part(content)]
    if not isinstance(content, list):
        raise invalid(where, content, "Give a string, or an array of text blocks.")
    return [part for at, block in enumerate(content) for part in _text_parts(block, f"{where}.{at}")]


def _text_parts(block: Any, where: str) -> list[Fields]:
    """The text parts of a block: text, or a document or search result that is text."""
    kind = _type(block, where)
    if kind == "text":
        return [_text_part(_string(block, "text", where))]
    if kind == "mid_conv_system":
        return _texts(block.get("content", block.get("text")), where)
    if kind == "search_result":
        heads = [block[name] for name in ("title", "source") if isinstance(block.get(name), str)]
        return [*map(_text_part, heads), *_texts(block.get("content"), f"{where}.content")]
    source = block.get("source")
    if kind == "document" and isinstance(source, dict):
        title = [_text_part(block["title"])] if isinstance(block.get("title"), str) else []
        if source.get("type") == "text":
            return [*title, _text_part(_string(source, "data", f"{where}.source"))]
        if source.get("type") == "content":
            return [*title, *_texts(source.get("content"), f"{where}.source.content")]
        raise UnsupportedParameterError(
            f"'{where}.source' of the type {shown(source.get('type'))} is not supported by this model. Give a document "
            'as text: {"type": "text", "media_type": "text/plain", "data": "..."}.',
            param=f"{where}.source",
        )
    raise UnsupportedParameterError(
        f"'{where}' is a block of the type {shown(kind)}, which this model does not support here. Send text instead.",
        param=where,
    )


def _type(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise invalid(where, block, 'A block is an object with a type, such as {"type": "text", "text": "..."}.')
    return kind


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise invalid(f"{where}.{name}", value, "Give a string.")
    return value


def _text_part(text: str) -> Fields:
    return {"type": "text", "text": text}


# ---- tools, thinking and the form of the answer -----------------------------------------------------------------


def _tools(request: CountTokensRequest) -> Fields:
    tools = [_tool(tool, f"tools.{at}") for at, tool in enumerate(request.tools or ())]
    fields: Fields = {"tools": tools} if tools else {}
    choice = request.tool_choice
    if choice is None:
        return fields
    kind = choice.get("type")
    if kind == "tool":
        name = _string(choice, "name", "tool_choice")
        if name not in [tool["function"]["name"] for tool in tools]:
            raise invalid("tool_choice.name", name, "It is not the name of a tool in 'tools'.")
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        if kind == "any" and not tools:
            raise invalid("tool_choice", choice, "There are no 'tools' to choose from.")
        if tools:
            fields["tool_choice"] = _TOOL_CHOICES[kind]
    else:
        raise invalid("tool_choice", choice, _CHOICE_REMEDY)
    is_single = _flag(choice, "disable_parallel_tool_use", "tool_choice")
    return fields | {"parallel_tool_calls": False} if is_single and tools else fields


def _tool(tool: Mapping[str, Any], where: str) -> Fields:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise UnsupportedParameterError(
            f"'{where}.type' {shown(kind)} is a tool of Anthropic's servers, which is not supported here. Leave it "
            "out, or describe it as a tool of your own, with an input_schema.",
            param=f"{where}.type",
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise invalid(f"{where}.input_schema", schema, 'Give a JSON schema, such as {"type": "object"}.')
    function: Fields = {"name": _string(tool, "name", where), "parameters": {"type": "object", **schema}}
    if tool.get("description") is not None:
        function["description"] = _string(tool, "description", where)
    if _flag(tool, "strict", where):
        function["strict"] = True
    return {"type": "function", "function": function}


def _thinking(thinking: Mapping[str, Any]) -> Fields:
    kind, budget = thinking.get("type"), thinking.get("budget_tokens")
    if not thinking or kind == "adaptive":
        return {}
    if kind == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False}}
    if kind != "enabled":
        raise invalid("thinking.type", kind, 'Give "enabled", "adaptive" or "disabled".')
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise invalid(
            "thinking.budget_tokens", budget, "Give the most tokens for thinking, a whole number of at least 1."
        )
    return {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": budget}


def _output(request: CountTokensRequest) -> Fields:
    config = request.output_config or {}
    fields: Fields = {}
    effort = config.get("effort")
    if effort is not None:
        if not isinstance(effort, str) or len(effort) > MAX_EFFORT_CHARS:
            raise invalid("output_config.effort", effort, 'Give "low", "medium", "high", "xhigh" or "max".')
        fields["reasoning_effort"] = effort
    given, name = config.get("format"), "output_config.format"
    if given is None:
        given, name = request.output_format, "output_format"
    if given is not None:
        if not isinstance(given, dict) or given.get("type") != "json_schema":
            raise invalid(name, given, _FORMAT_REMEDY)
        if not isinstance(given.get("schema"), dict):
            raise invalid(f"{name}.schema", given.get("schema"), _FORMAT_REMEDY)
        named = {"name": "answer", "schema": given["schema"], "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return fields


def _flag(fields: Mapping[str, Any], name: str, where: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{where}.{name}", value, "Give true or false.")
    return bool(value)
