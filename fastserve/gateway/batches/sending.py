"""Sends requests of batches through the relay, as a client's requests are sent, and knows how busy workers are."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import msgspec
from starlette.types import Message

from fastserve.errors import FastserveError
from fastserve.gateway.apis.find import api_of
from fastserve.gateway.attempt import ClientRequest
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.relay import Relay
from fastserve.openai.answers import encode_json
from fastserve.openai.generation import MAX_PRIORITY
from fastserve.openai.routes import ModelRoute
from fastserve.protocol import MAX_SEED

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_LAST = msgspec.Raw(str(MAX_PRIORITY).encode())


class BatchSender:
    def __init__(self, relay: Relay, dispatcher: Dispatcher, routes: Mapping[str, ModelRoute], hops: str) -> None:
        """`routes`: by path. `hops`: value of HOPS_HEADER for workers."""
        self._relay = relay
        self._dispatcher = dispatcher
        self._routes = routes
        self._hops = hops

    async def model_of(self, path: str, body: bytes) -> str:
        """The model that a request is for. Raises RequestError."""
        route = self._routes[path]
        model, _ = await api_of(route.api).read_target(body, self._dispatcher, streams=route.streams)
        return model

    async def send(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """Returns status and body of the answer."""
        route = self._routes[path]
        if "priority" in route.request.model_fields:
            fields = _decode_fields(body)
            fields.setdefault("priority", _LAST)  # behind whoever waits for an answer
            body = msgspec.json.encode(fields)
        answer = _Collector()
        try:
            model = await self.model_of(path, body)
            request = ClientRequest(
                *(route, body, model, False, request_id, self._hops, time.monotonic()),
                random.randint(0, MAX_SEED),
                api_of(route.api),
            )
            await self._relay.forward(request, answer.send)
        except FastserveError as error:
            return error.status, encode_json(error.body())
        return answer.status, b"".join(answer.pieces)

    def load(self, model: str) -> tuple[int, int]:
        """Workers of a model, and requests on all of them."""
        return self._dispatcher.load_of(model)


class _Collector:
    """Stands for the client."""

    def __init__(self) -> None:
        self.status = 500
        self.pieces: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.pieces.append(message.get("body", b""))
