"""S-LoRA's API: `lora_dir` in the request, and in a stream an event for each token, of which the last is `finished`."""

from __future__ import annotations

from typing import Any

import msgspec

from fastserve.gateway.answers import decode_event, error_alone
from fastserve.gateway.apis import SERVER_SENT_EVENTS, EventKind
from fastserve.gateway.apis.only_base import only_base
from fastserve.gateway.apis.openai import ERROR_STATUSES
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek_slora
from fastserve.openai.answers import slora_failure

_REMEDY = "Give one of them as 'model', or an adapter as 'lora_dir'."


class _Token(msgspec.Struct):
    """Fields that clients read."""

    id: int
    text: str


class _Event(msgspec.Struct):
    token: _Token
    finished: bool | int
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode


class SLoraApi:
    media_type = SERVER_SENT_EVENTS
    event_start = b"data:{"
    end_of_errors = b""
    plain_errors = False
    error_statuses = ERROR_STATUSES

    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        model, lora_dir = peek_slora(body)
        if lora_dir is not None:
            model = await dispatcher.find_source(lora_dir, model)
        return model or only_base(dispatcher, _REMEDY), bool(streams)

    def read_event(self, data: bytes) -> EventKind:
        event = decode_event(_decode, data, "S-LoRA")
        if event.error is not None or event.finished == -1:
            return "error"
        return "last" if event.finished else "data"

    def error_body(self, data: bytes) -> bytes:
        return error_alone(data)

    def failure(self, error: Any) -> bytes:
        return slora_failure(error)


SLORA = SLoraApi()
