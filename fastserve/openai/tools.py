"""Fields of a chat request about tools and reasoning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.observability.text import printable
from fastserve.openai.body import Flag, Integer, at_most, invalid

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_NAME_REMEDY = "A function's name has 1 to 128 letters, digits, underscores and hyphens."
_CHOICE_REMEDY = (
    'Give "none", "auto", "required", or an object: {"type": "function", "function": {"name": ...}}, or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}.'
)
_MODES = ("none", "auto", "required")
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True), at_most("max_tools", "tools")]


@dataclass(frozen=True)
class FunctionTool:
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False
    param: str = ""
    """Path of the parameters in the request, for errors."""


@dataclass(frozen=True)
class ToolUse:
    """Tools of one request, and which of them the model may or must call."""

    shown: list[dict[str, Any]]
    """For the chat template, in OpenAI's format."""
    functions: Sequence[FunctionTool]
    """The functions that may be called."""
    is_required: bool = False
    is_named: bool = False
    """Whether the request names the one function to call."""
    is_parallel: bool = True
    is_old: bool = False
    """Whether the request has `functions`, and gets `function_call`."""

    @property
    def enforced(self) -> list[FunctionTool]:
        """The functions whose arguments must obey their schemas."""
        return [function for function in self.functions if self.is_required or function.is_strict]


class ToolFields(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    tools: Tools | None = None
    """Functions that the model may call. Tools of other types are refused."""
    tool_choice: Any = None
    """"auto" (the default with tools), "none", "required", one function, or `allowed_tools`. Calls that must come, and
    their arguments, are enforced by a grammar."""
    parallel_tool_calls: Flag | None = None
    """Whether an answer may have several calls. Default: on."""
    functions: Tools | None = None
    """The old form of tools."""
    function_call: Any = None
    """The old form of tool_choice: "auto", "none", or {"name": ...}."""
    reasoning_effort: ReasoningEffort | None = None
    """Passed to the chat template; "none" switches thinking off where the template can."""
    thinking_token_budget: Integer | None = Field(None, ge=0, le=2**31 - 1)
    """Maximum tokens of reasoning, after which its end is forced."""
    include_reasoning: Flag | None = None
    """Whether the answer contains the reasoning. Default: on."""
    separate_reasoning: Flag | None = None
    """Whether reasoning has a field of its own in the answer, instead of being part of the content. Default: on."""

    def tool_use(self) -> ToolUse | None:
        """The tools, validated; None if none may be called. Raises InvalidRequestError or UnsupportedParameterError."""
        if self.functions:
            return self._old_use(self.functions)
        if self.function_call not in (None, "none"):
            raise invalid("function_call", self.function_call, "It needs 'functions'.")
        tools = self.tools or []
        functions = list(_read_tools(tools))
        if not functions:
            if self.tool_choice not in (None, "none"):
                raise invalid("tool_choice", self.tool_choice, "It needs 'tools'.")
            return None
        use = ToolUse(tools, functions, is_parallel=self.parallel_tool_calls is not False)
        return _choose(use, self.tool_choice)

    def _old_use(self, functions: list[dict[str, Any]]) -> ToolUse | None:
        if self.tools:
            raise invalid("functions", functions, "Give either 'tools' or 'functions'.")
        read = [_read_function(function, f"functions.{at}") for at, function in enumerate(functions)]
        _refuse_duplicates(read, "functions")
        shown = [{"type": "function", "function": function} for function in functions]
        choice = self.function_call
        match choice:
            case None | "auto":
                return ToolUse(shown, read, is_parallel=False, is_old=True)
            case "none":
                return None
            case {"name": str(name)}:
                return ToolUse(
                    shown,
                    [_find(read, name, "function_call.name")],
                    is_required=True,
                    is_named=True,
                    is_parallel=False,
                    is_old=True,
                )
        raise invalid("function_call", choice, 'Give "none", "auto", or {"name": ...}.')

    def template_variables(self) -> dict[str, Any]:
        """Variables of chat templates that follow from the effort of reasoning."""
        if self.reasoning_effort is None:
            return {}
        thinks = self.reasoning_effort != "none"
        return {"reasoning_effort": self.reasoning_effort, "enable_thinking": thinks, "thinking": thinks}


def _choose(use: ToolUse, choice: Any) -> ToolUse | None:
    functions = use.functions
    match choice:
        case None | "auto":
            return use
        case "none":
            return None
        case "required":
            return ToolUse(use.shown, functions, is_required=True, is_parallel=use.is_parallel)
        case {"type": "function", "function": {"name": str(name)}}:
            chosen = _find(functions, name, "tool_choice.function.name")
            return ToolUse(use.shown, [chosen], is_required=True, is_named=True, is_parallel=False)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)}}:
            names = [_allowed_name(tool, f"tool_choice.allowed_tools.tools.{at}") for at, tool in enumerate(allowed)]
            if not names:
                raise invalid("tool_choice.allowed_tools.tools", allowed, "Give at least one.")
            where = "tool_choice.allowed_tools.tools"
            chosen_ones = [_find(functions, name, f"{where}.{at}") for at, name in enumerate(dict.fromkeys(names))]
            return ToolUse(use.shown, chosen_ones, is_required=mode == "required", is_parallel=use.is_parallel)
        case {"type": "custom"}:
            raise _custom("tool_choice")
    raise invalid("tool_choice", choice, _CHOICE_REMEDY)


def _allowed_name(tool: Any, where: str) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
        case {"type": "custom"}:
            raise _custom(where)
    raise invalid(where, tool, 'Give {"type": "function", "function": {"name": ...}}.')


def _find(functions: Sequence[FunctionTool], name: str, where: str) -> FunctionTool:
    for function in functions:
        if function.name == name:
            return function
    raise invalid(where, name, "No function of this name is in the request's tools.")


def _read_tools(tools: Sequence[dict[str, Any]]) -> Iterator[FunctionTool]:
    functions = []
    for at, tool in enumerate(tools):
        kind = tool.get("type", "function")
        if kind == "custom":
            raise _custom(f"tools.{at}")
        if kind != "function":
            if not isinstance(kind, str):
                raise invalid(f"tools.{at}.type", kind, 'Give "function".')
            raise UnsupportedParameterError(
                f"'tools.{at}': tools of type '{printable(kind, 40)}' are not supported. Give functions only.",
                param=f"tools.{at}",
            )
        functions.append(_read_function(tool.get("function"), f"tools.{at}.function"))
    _refuse_duplicates(functions, "tools")
    yield from functions


def _read_function(function: Any, where: str) -> FunctionTool:
    if not isinstance(function, dict):
        raise invalid(where, function, 'Give an object with "name", "description" and "parameters".')
    name = function.get("name")
    if name is None:
        raise InvalidRequestError(
            f"Missing required field '{where}.name'.", param=f"{where}.name", code="missing_required_parameter"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{where}.name", name, _NAME_REMEDY)
    if not isinstance(function.get("description", ""), str | None):
        raise invalid(f"{where}.description", function["description"], "Give a string.")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.strict", strict, "Give true or false.")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise invalid(f"{where}.parameters", parameters, 'Give a JSON schema of the type "object".')
    return FunctionTool(name, parameters, strict is True, f"{where}.parameters")


def _refuse_duplicates(functions: Sequence[FunctionTool], where: str) -> None:
    seen = set()
    for at, function in enumerate(functions):
        if function.name in seen:
            raise invalid(f"{where}.{at}", function.name, "Another tool has this name. Give each its own.")
        seen.add(function.name)


def _custom(where: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(
        f"'{where}': custom tools are not supported. Give functions, whose arguments are JSON.", param=where
    )


def check_answers(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that each message of a tool answers a call of the assistant's turn before it, and that each call is
    answered before the chat goes on. `messages`: as chat templates expect them. Raises InvalidRequestError.
    """
    open_ids: dict[str, str] = {}
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id is None:
                continue  # a function's message of old clients
            if call_id not in open_ids:
                raise invalid(
                    f"messages.{at}.tool_call_id",
                    call_id,
                    "It must be the id of a call in the assistant's turn before, which no other message answers.",
                )
            del open_ids[call_id]
            continue
        _refuse_open(open_ids)
        open_ids = {
            call["id"]: f"messages.{at}.tool_calls.{number}"
            for number, call in enumerate(message.get("tool_calls", ()))
            if isinstance(call.get("id"), str)
        }
    _refuse_open(open_ids)


def _refuse_open(open_ids: Mapping[str, str]) -> None:
    for call_id, where in open_ids.items():
        raise invalid(where, call_id, "No message of the role tool answers this call: add one with its tool_call_id.")
