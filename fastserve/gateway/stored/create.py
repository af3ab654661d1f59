"""`POST /v1/responses` with a store: resolves what the request refers to, relays it, and stores the response.

This is the only place where the API server changes a request's body: a worker has no store, so it gets the whole input.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from fastserve.errors import FastserveError, InvalidRequestError
from fastserve.gateway.apis.responses import ResponsesApi
from fastserve.gateway.attempt import ClientRequest
from fastserve.gateway.peek import ResponsePeek, peek_response
from fastserve.gateway.routes import Gateway, gateway_of, make_request
from fastserve.gateway.stored.background import Run, replay
from fastserve.gateway.stored.entries import NewResponse, Store, not_found
from fastserve.gateway.stored.items import input_items, joined, references, replaced
from fastserve.gateway.stored.state import StoredState, stored_state_of
from fastserve.openai.answers import JSON, encode_json
from fastserve.openai.body import RequestBounds, invalid
from fastserve.openai.responses.answer import FIRST_EVENTS_OF_BACKGROUND, event, response_object
from fastserve.openai.responses.head import ResponseHead, new_id
from fastserve.openai.responses.request import ResponsesRequest, read_request
from fastserve.openai.responses.tools import chat_tools
from fastserve.openai.routes import RESPONSE_TOKENS, RESPONSES, ModelRoute
from fastserve.protocol import RESPONSE_HEADER
from fastserve.serving.responses import StreamResponse, run_until_disconnect

logger = logging.getLogger(__name__)

_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@dataclass(frozen=True)
class _Resolved:
    """A request whose input is whole."""

    body: bytes
    own_input: bytes
    """JSON of the input that the client has sent, its references resolved."""
    head: ResponseHead
    previous: str | None
    conversation: str | None

    def response(self, owner: str, content: bytes) -> NewResponse:
        """The response, to be stored. `content`: JSON of its object."""
        return NewResponse(owner, self.head, content, input_items(self.own_input), self.previous, self.conversation)


class ResponsesEndpoint:
    """A route of the Responses API that is relayed to a worker."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_at = time.monotonic()
        request = Request(scope, receive)
        gateway, state = gateway_of(request), stored_state_of(request)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        if state is None:  # the worker refuses what needs a store
            await _forward(request, gateway, await make_request(request, gateway, self._route, body, started_at), send)
            return
        asked = peek_response(body)
        owner: str = request.state.key_owner
        resolved = await _resolve(state.store, owner, asked, body)
        relayed = await make_request(request, gateway, self._route, resolved.body, started_at)
        relayed = replace(relayed, headers={RESPONSE_HEADER: resolved.head.encode()})
        if self._route is not RESPONSES:
            await _forward(request, gateway, relayed, send)
        elif asked.background:
            response = await _start_in_background(state, owner, relayed, resolved)
            await response(scope, receive, send)
        else:
            save = partial(_save, state.store, owner, resolved)
            recorder = _Recorder(send, relayed, save) if _is_saved(resolved) else send
            await _forward(request, gateway, relayed, recorder)


async def _forward(request: Request, gateway: Gateway, relayed: ClientRequest, send: Send) -> None:
    with gateway.metrics.in_flight.track_inprogress():
        await run_until_disconnect(request, gateway.relay.forward(relayed, send))


def _is_saved(resolved: _Resolved) -> bool:
    return resolved.head.is_stored or resolved.conversation is not None


async def _resolve(store: Store, owner: str, asked: ResponsePeek, body: bytes) -> _Resolved:
    """Raises InvalidRequestError, EntryNotFoundError and BodyTooLargeError."""
    previous, conversation = asked.previous_response_id, asked.conversation_id
    if previous is not None and conversation is not None:
        raise invalid(
            "previous_response_id", previous, "It cannot be given with 'conversation': leave out one of them."
        )
    own = bytes(asked.input)
    prior: list[bytes] = []
    if previous is not None:
        prior = [item.content for item in await store.context(owner, previous)]
    elif conversation is not None:
        prior = [item.content for item in await store.conversation_context(owner, conversation)]
    own_resolved = await _resolve_references(store, owner, own)
    if prior or own_resolved is not own:
        fields = _fields_of(body)
        fields["input"] = msgspec.Raw(joined(prior, own_resolved) if prior else own_resolved)
        body = msgspec.json.encode(fields)
    head = ResponseHead(new_id("resp"), int(time.time()), len(prior), is_stored=asked.store is not False)
    return _Resolved(body, own_resolved, head, previous, conversation)


async def _resolve_references(store: Store, owner: str, own_input: bytes) -> bytes:
    found = references(own_input)
    if not found:
        return own_input
    items = await store.find_items(owner, {item_id for _, item_id in found})
    for number, item_id in found:
        if item_id not in items:
            raise not_found("Item", item_id, f"input.{number}.id")
    return replaced(own_input, {number: items[item_id] for number, item_id in found})


async def _save(store: Store, owner: str, resolved: _Resolved, content: bytes) -> None:
    """Store a response that has ended. Its client gets it in any case."""
    try:
        await store.save(resolved.response(owner, content))
    except FastserveError as error:
        logger.error("Response %s was not stored: %s", resolved.head.id, error.message)


class _Recorder:
    """Passes an answer on to the client. Before the client gets its end, the response is stored: the next request may
    refer to it at once.
    """

    def __init__(self, send: Send, request: ClientRequest, save: Callable[[bytes], Awaitable[None]]) -> None:
        self._send = send
        self._request = request
        self._save = save
        self._status = 0
        self._is_saved = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif not self._is_saved and self._status == 200:
            api = self._request.api
            if not self._request.stream:
                self._is_saved = True
                await self._save(message["body"])
            elif isinstance(api, ResponsesApi) and api.is_ended:
                self._is_saved = True
                await self._save(api.response)
        await self._send(message)


async def _start_in_background(state: StoredState, owner: str, relayed: ClientRequest, resolved: _Resolved) -> Response:
    """Raises InvalidRequestError, OverloadedError and ServiceError."""
    head = resolved.head
    request = await asyncio.to_thread(read_request, resolved.body, RequestBounds())
    queued = _queued(request, head)
    content = encode_json(queued)
    kinds = ("response.created", "response.queued")
    events = [event(kind, number, {"response": queued}) for number, kind in enumerate(kinds)]
    api = ResponsesApi(content, FIRST_EVENTS_OF_BACKGROUND, keeps_events=True)
    body = msgspec.json.encode(_fields_of(relayed.body) | {"stream": True})
    run = Run(owner, head.id, replace(relayed, body=body, stream=True, api=api), api)
    with state.runs.room():
        await state.store.begin(resolved.response(owner, content), events)
        state.runs.start(run)
    if request.stream:
        return StreamResponse(replay(state.store, owner, head.id, -1))
    return Response(content, media_type=JSON)


def _queued(request: ResponsesRequest, head: ResponseHead) -> dict[str, object]:
    if not head.is_stored:
        raise InvalidRequestError(
            "'background' needs store=true, since its answer is fetched from the store.", param="background"
        )
    return response_object(request, head, "queued", chat_tools(request.tools, request.tool_choice).offered)


def responses_routes() -> list[BaseRoute]:
    return [Route(route.path, ResponsesEndpoint(route), methods=["POST"]) for route in (RESPONSES, RESPONSE_TOKENS)]
