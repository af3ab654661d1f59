"""Input items as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import RequestBounds, invalid, shown

Fields = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_INSTRUCTING = ("system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of text parts, and the field with their text."""
_REASONING_TEXTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}
_PART_SEPARATOR = "\n"
CUSTOM_INPUT = "input"
"""Name of the one argument of a custom tool, whose input is a text and not an object."""


class ItemTranslator:
    """Makes messages of items. Items of one turn of the model (reasoning, text, calls) become one message."""

    def __init__(self, bounds: RequestBounds, num_prior_items: int = 0) -> None:
        """`num_prior_items`: items at the beginning that the client has not sent, so errors cannot number them."""
        self._bounds = bounds
        self._num_prior = num_prior_items
        self._num_parts = 0
        self._reasoning = ""
        self.messages: list[Fields] = []
        self.names: dict[str, str] = {}
        """Paths in the request's `input`, for errors, by paths in `messages`."""

    def instruct(self, text: str, where: str) -> None:
        """Add a system message. Several at the beginning become one, as most templates allow no other."""
        if self.messages and all(message["role"] == "system" for message in self.messages):
            self.messages[0]["content"] += "\n\n" + text
            return
        self._add({"role": "system", "content": text}, where)

    def add_all(self, items: Any) -> None:
        """Add the request's `input`. Raises InvalidRequestError."""
        if isinstance(items, str):
            self._add({"role": "user", "content": items}, "input")
            return
        if not isinstance(items, list) or not items:
            raise invalid("input", items, "Give a string, or an array of items, not empty.")
        for number, item in enumerate(items):
            at = number - self._num_prior
            self._add_item(item, "input" if at < 0 else f"input.{at}")

    def _add_item(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise invalid(where, item, "Give an object.")
        kind = item.get("type", "message")
        if kind == "message" or (kind is None and "role" in item):
            self._add_message(item, where)
        elif kind == "reasoning":
            self._reasoning += self._texts(
                item.get("content") or item.get("summary") or [], f"{where}.content", _REASONING_TEXTS
            )
        elif kind in ("function_call", "custom_tool_call"):
            self._add_call(item, where)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = self._texts(item.get("output"), f"{where}.output")
            self._add(
                {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": content},
                where,
                {"tool_call_id": "call_id", "content": "output"},
            )
        elif kind == "item_reference":
            raise UnsupportedParameterError(
                f"'{where}' is a reference to an item ({shown(item.get('id'))}), and this server keeps no items. Send "
                "the item itself.",
                param=where,
            )
        elif isinstance(kind, str):
            raise UnsupportedParameterError(
                f"'{where}.type' is not supported (given: {shown(kind)}). Send messages, reasoning, function calls and "
                "their outputs.",
                param=f"{where}.type",
            )
        else:
            raise invalid(f"{where}.type", kind, "Give a string, such as message.")

    def _add_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"{where}.role", role, f"Give one of {', '.join(_ROLES)}.")
        text = self._texts(item.get("content"), f"{where}.content")
        if role in _INSTRUCTING:
            self.instruct(text, where)
            return
        message = {"role": role, "content": text}
        if role == "assistant" and self._reasoning:
            message["reasoning_content"] = self._reasoning
        self._add(message, where)

    def _add_call(self, item: Mapping[str, Any], where: str) -> None:
        if item["type"] == "custom_tool_call":
            arguments: Any = {CUSTOM_INPUT: _string(item, "input", where)}
        else:
            arguments = _string(item, "arguments", where)
        call = {
            "id": _string(item, "call_id", where),
            "type": "function",
            "function": {"name": _string(item, "name", where), "arguments": arguments},
        }
        self._count_part(where)
        if not self.messages or self.messages[-1]["role"] != "assistant" or self._reasoning:
            message: Fields = {"role": "assistant", "content": None}
            if self._reasoning:
                message["reasoning_content"] = self._reasoning
            self._add(message, where)
        calls = self.messages[-1].setdefault("tool_calls", [])
        path = f"messages.{len(self.messages) - 1}.tool_calls.{len(calls)}"
        self.names |= {path: where, f"{path}.id": f"{where}.call_id", f"{path}.function": where}
        calls.append(call)

    def _add(self, message: Fields, where: str, names: Mapping[str, str] | None = None) -> None:
        path = f"messages.{len(self.messages)}"
        self.names[path] = where
        for ours, theirs in (names or {}).items():
            self.names[f"{path}.{ours}"] = f"{where}.{theirs}"
        self.messages.append(message)
        self._reasoning = ""

    def _count_part(self, where: str) -> None:
        self._num_parts += 1
        if self._num_parts > self._bounds.max_content_parts:
            raise InvalidRequestError(
                f"Invalid value for '{where}': the request has more than {self._bounds.max_content_parts} content "
                "parts and calls (--max-content-parts). Send less in one request.",
                param=where,
            )

    def _texts(self, content: Any, where: str, kinds: Mapping[str, str] = _TEXTS) -> str:
        """The text of a string or of text parts. Raises InvalidRequestError for anything else."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise invalid(where, content, "Give a string, or an array of text parts.")
        texts = []
        for part in content:
            self._count_part(where)
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and isinstance(part.get(kinds.get(kind)), str):
                texts.append(part[kinds[kind]])
            elif isinstance(kind, str) and kind not in kinds:
                raise UnsupportedParameterError(
                    f"'{where}' has a part of type {shown(kind)}, which is not supported here. Send text parts only.",
                    param=where,
                )
            else:
                raise invalid(where, part, 'A text part is {"type": "input_text", "text": "..."}.')
        return _PART_SEPARATOR.join(texts)


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        raise InvalidRequestError(
            f"Missing required field '{where}.{name}'.", param=f"{where}.{name}", code="missing_required_parameter"
        )
    raise invalid(f"{where}.{name}", value, "Give a string.")
