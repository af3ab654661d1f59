"""Tools as the Responses API writes them (flat), as tools of a chat (nested).

Hosted tools are run by OpenAI's servers. Agents such as Codex offer some with every request and do well without them,
so those of `LEFT_OUT` are not shown to the model, and the answer's `tools` lists only what the model has. Those that
refer to data or programs elsewhere, without which the answer would be another, are refused.

A custom tool takes a text in place of an object. To the model it is a function with one argument, the text. A grammar
of that text is shown to the model in the tool's description; it is not enforced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.observability.text import printable
from fastserve.openai.body import invalid, shown
from fastserve.openai.responses.items import CUSTOM_INPUT

Fields = dict[str, Any]

LEFT_OUT = frozenset(
    {
        *("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        *("image_generation", "local_shell", "shell", "apply_patch", "tool_search", "namespace"),
    }
)
_REFUSED = frozenset({"file_search", "code_interpreter", "mcp", "computer", "computer_use", "computer_use_preview"})
_MODES = ("auto", "none", "required")


@dataclass(frozen=True)
class ChatTools:
    """Tools and choice of a chat request."""

    fields: Fields = field(default_factory=dict)
    """`tools` and `tool_choice`, each only if it is given."""
    offered: Sequence[Fields] = ()
    """The request's tools that the model has, as the answer lists them."""
    custom: frozenset[str] = frozenset()
    """Names of the custom tools."""
    names: dict[str, str] = field(default_factory=dict)
    """Paths in the request, for errors, by paths in `fields`."""


def chat_tools(tools: Sequence[Fields] | None, choice: Any) -> ChatTools:
    """Raises InvalidRequestError and UnsupportedParameterError."""
    nested: list[Fields] = []
    offered: list[Fields] = []
    names: dict[str, str] = {}
    for number, tool in enumerate(tools or ()):
        where = f"tools.{number}"
        kind = tool.get("type")
        if kind in ("function", "custom"):
            function = _custom_function(tool, where) if kind == "custom" else tool
            path = f"tools.{len(nested)}"
            names |= {path: where, f"{path}.function": where}
            given = {key: function.get(key) for key in ("name", "description", "parameters", "strict")}
            nested.append({"type": "function", "function": {k: v for k, v in given.items() if v is not None}})
            offered.append({"strict": False, **tool} if kind == "function" else tool)
        elif not isinstance(kind, str):
            raise invalid(f"{where}.type", kind, "Give the type of the tool, such as function.")
        elif kind in _REFUSED:
            _refuse(where, kind, "This server runs no tools: declare a function, and run it yourself.")
        elif kind not in LEFT_OUT:
            raise invalid(f"{where}.type", kind, "There is no such type of tool. Declare a function.")
    fields: Fields = {"tools": nested} if nested else {}
    if choice is not None:
        # Other names are refused with the rest of the tools.
        named = {(tool["type"], tool["name"]) for tool in offered if isinstance(tool.get("name"), str)}
        chosen = _choice(choice, named)
        if nested or chosen not in ("auto", "none"):
            fields["tool_choice"] = chosen
    custom = frozenset(str(tool.get("name")) for tool in offered if tool["type"] == "custom")
    return ChatTools(fields, offered, custom, names)


def _custom_function(tool: Fields, where: str) -> Fields:
    """A custom tool as a function."""
    form = tool.get("format") or {"type": "text"}
    if not isinstance(form, dict) or form.get("type") not in ("text", "grammar"):
        raise invalid(f"{where}.format", form, 'Give {"type": "text"} or a grammar.')
    description = tool.get("description") or ""
    if not isinstance(description, str):
        raise invalid(f"{where}.description", description, "Give a string.")
    if form["type"] == "grammar":
        definition, syntax = form.get("definition"), form.get("syntax")
        if not isinstance(definition, str) or syntax not in ("lark", "regex"):
            raise invalid(f"{where}.format", form, "A grammar has a 'syntax', lark or regex, and a 'definition'.")
        description += f"\n\nThe {CUSTOM_INPUT} must match this {syntax} grammar:\n{definition}"
    schema = {
        "type": "object",
        "properties": {CUSTOM_INPUT: {"type": "string"}},
        "required": [CUSTOM_INPUT],
        "additionalProperties": False,
    }
    return {"name": tool.get("name"), "description": description.strip() or None, "parameters": schema}


def _refuse(where: str, kind: str, remedy: str) -> None:
    raise UnsupportedParameterError(
        f"Tools of type '{printable(kind, 40)}' are not supported ('{where}'). {remedy}", param=where
    )


def _choice(choice: Any, offered: set[tuple[Any, Any]]) -> Any:
    if isinstance(choice, str):
        if choice not in _MODES:
            raise invalid("tool_choice", choice, f"Give one of {', '.join(_MODES)}, or an object.")
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind in ("function", "custom"):
        return {"type": "function", "function": {"name": _offered_name(choice, "tool_choice", offered)}}
    if kind == "allowed_tools":
        mode, allowed = choice.get("mode", "auto"), choice.get("tools")
        if mode not in ("auto", "required"):
            raise invalid("tool_choice.mode", mode, "Give auto or required.")
        if not isinstance(allowed, list):
            raise invalid("tool_choice.tools", allowed, "Give an array of tools.")
        listed = []
        for number, tool in enumerate(allowed):
            where = f"tool_choice.tools.{number}"
            if not isinstance(tool, dict):
                raise invalid(where, tool, 'A tool is {"type": "function", "name": "..."}.')
            if tool.get("type") in ("function", "custom"):
                listed.append({"type": "function", "function": {"name": _offered_name(tool, where, offered)}})
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}
    if isinstance(kind, str):
        raise UnsupportedParameterError(
            f"'tool_choice' names a tool of type '{printable(kind, 40)}', which this server does not run. Name a "
            "function.",
            param="tool_choice",
        )
    raise invalid("tool_choice", choice, f"Give one of {', '.join(_MODES)}, or an object with a type.")


def _offered_name(tool: Fields, where: str, offered: set[tuple[Any, Any]]) -> str:
    name = tool.get("name")
    if not isinstance(name, str):
        raise invalid(f"{where}.name", name, "Give the name of a function in 'tools'.")
    if (tool["type"], name) not in offered:
        raise InvalidRequestError(
            f"Invalid value for '{where}.name': {shown(name)}. There is no such {tool['type']} tool in 'tools'.",
            param=f"{where}.name",
        )
    return name
