"""Items as the store keeps them: JSON objects with an id each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import invalid
from fastserve.openai.responses.head import new_id

MAX_ID_CHARS = 128
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_Fields = dict[str, msgspec.Raw]
_decode_list = msgspec.json.Decoder(list[_Fields]).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.encode


@dataclass(frozen=True)
class Item:
    id: str
    content: bytes
    """JSON of the whole item."""


def input_items(raw: bytes) -> list[Item]:
    """The items of a request's `input`, or a list of items. Raises InvalidRequestError."""
    try:
        if raw.lstrip().startswith(b'"'):
            return [_item({"role": msgspec.Raw(b'"user"'), "content": msgspec.Raw(raw)})]
        return [_item(fields) for fields in _decode_list(raw)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            "Invalid value for 'input'. Give a string, or an array of items.", param="input"
        ) from error


def _item(fields: _Fields) -> Item:
    kind = _string(fields, "type") or "message"
    fields.setdefault("type", msgspec.Raw(b'"message"'))
    if kind == "message":
        fields.setdefault("status", msgspec.Raw(b'"completed"'))
        content = fields.get("content")
        if content is not None and bytes(content).lstrip().startswith(b'"'):
            part = "output_text" if _string(fields, "role") == "assistant" else "input_text"
            text = b'[{"type":"%b","text":%b}]' % (part.encode(), bytes(content))
            fields["content"] = msgspec.Raw(text)
    item_id = _string(fields, "id")
    if not item_id or len(item_id) > MAX_ID_CHARS:
        item_id = new_id(_PREFIXES.get(kind, "item"))
        fields = {"id": msgspec.Raw(_encode(item_id)), **{name: raw for name, raw in fields.items() if name != "id"}}
    return Item(item_id, _encode(fields))


def output_items(response: bytes) -> list[Item]:
    """The items of a response's `output`."""
    return input_items(bytes(msgspec.json.decode(response, type=_Fields)["output"]))


def joined(items: Iterable[bytes], raw_input: bytes) -> bytes:
    """The JSON list of the items and those of a request's `input`, which is not parsed."""
    text = raw_input.strip()
    if text.startswith(b'"'):
        own = input_items(text)[0].content
    elif text.startswith(b"["):
        own = text[1:-1].strip()
    else:
        raise invalid("input", _decode_any(text or b"null"), "Give a string, or an array of items.")
    return b"[" + b",".join([*items, *((own,) if own else ())]) + b"]"


def references(raw_input: bytes) -> list[tuple[int, str]]:
    """Positions and ids of the references to items in a request's `input`."""
    if b"item_reference" not in raw_input:
        return []
    found = []
    for number, fields in enumerate(_list(raw_input)):
        if _string(fields, "type") == "item_reference":
            item_id = _string(fields, "id")
            if item_id is None:
                raise invalid(f"input.{number}.id", None, "Give the id of an item.")
            found.append((number, item_id))
    return found


def replaced(raw_input: bytes, items: dict[int, bytes]) -> bytes:
    """The list with other items at these positions."""
    listed: list[Any] = list(_list(raw_input))
    for number, content in items.items():
        listed[number] = msgspec.Raw(content)
    return _encode(listed)


def _list(raw_input: bytes) -> list[_Fields]:
    try:
        return _decode_list(raw_input)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []  # the worker refuses it, and names the field


def _string(fields: _Fields, name: str) -> str | None:
    raw = fields.get(name)
    value = None if raw is None else _decode_any(raw)
    return value if isinstance(value, str) else None
