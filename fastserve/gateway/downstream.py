"""The client's side of one relayed request: sends answers, streams, and errors in the form that is still possible."""

from __future__ import annotations

from typing import Any

from starlette.types import Send

from fastserve.gateway.answers import Answer
from fastserve.gateway.apis import JSON_LINES, SERVER_SENT_EVENTS, Api
from fastserve.gateway.apis.openai import OPENAI

_CONTENT_TYPES = {SERVER_SENT_EVENTS: b"text/event-stream; charset=utf-8", JSON_LINES: JSON_LINES.encode()}


class Downstream:
    def __init__(self, send: Send, api: Api = OPENAI) -> None:
        self._send = send
        self._api = api
        self._content_type = _CONTENT_TYPES[api.media_type]
        self.started = False
        """The status line has been sent: errors can only be sent as events."""
        self.has_data = False
        """A data event has been sent: no other worker can take over any more."""

    async def write(self, piece: bytes) -> None:
        """Send a piece of a stream."""
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", self._content_type),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Any) -> None:
        """End a started stream with the event of an error object."""
        await self.write(self._api.failure(error))
        await self.end()

    async def answer(self, answer: Answer) -> None:
        """Send a worker's answer; as an error event if keep-alive comments of a stream have been sent."""
        if self.started:
            await self.fail(answer.error())
            return
        await self._send({"type": "http.response.start", "status": answer.status, "headers": answer.headers()})
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": False})
