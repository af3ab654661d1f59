"""Routes for stored responses and conversations. A key sees its own alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field, field_validator
from starlette.responses import Response

from fastserve.errors import EntryNotFoundError, InvalidRequestError
from fastserve.gateway.api_docs import answers_with, json_body, may_refuse
from fastserve.gateway.apis import SERVER_SENT_EVENTS
from fastserve.gateway.stored.background import replay
from fastserve.gateway.stored.entries import Page, Store, not_found
from fastserve.gateway.stored.items import Item, input_items
from fastserve.gateway.stored.state import StoredState, stored_state_of
from fastserve.openai.answers import JSON
from fastserve.openai.body import RequestBounds, read_fields, renamed, validate
from fastserve.openai.responses.items import ItemTranslator
from fastserve.openai.responses.request import check_metadata
from fastserve.serving.responses import StreamResponse

MAX_NEW_ITEMS = 20
"""Items that one request adds to a conversation."""
MAX_LISTED = 100

router = APIRouter()


@dataclass(frozen=True)
class _Caller:
    """The caller's part of the store."""

    state: StoredState
    owner: str

    @property
    def store(self) -> Store:
        return self.state.store


def _caller(request: Request) -> _Caller:
    state = stored_state_of(request)
    if state is None:
        raise EntryNotFoundError(
            "This server stores no responses and conversations: it was started with --responses-store none."
        )
    return _Caller(state, request.state.key_owner)


def _page(
    after: Annotated[str | None, Query(description="Id of the last item of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="Most items of a page. Default: 20.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="desc (the default) lists the newest first.")] = "desc",
) -> Page:
    return Page(after, limit, is_ascending=order == "asc")


CallerDep = Annotated[_Caller, Depends(_caller)]
PageDep = Annotated[Page, Depends(_page)]


def _json(content: Any) -> Response:
    return Response(content if isinstance(content, bytes) else msgspec.json.encode(content), media_type=JSON)


def _list(items: Sequence[Item], *, has_more: bool) -> Response:
    return _json(
        {
            "object": "list",
            "data": [msgspec.Raw(item.content) for item in items],
            "first_id": items[0].id if items else None,
            "last_id": items[-1].id if items else None,
            "has_more": has_more,
        }
    )


# ---- responses ------------------------------------------------------------------------------------------------------


@router.get("/v1/responses/{response_id}", responses=answers_with(SERVER_SENT_EVENTS))
async def get_response(
    response_id: str,
    caller: CallerDep,
    stream: Annotated[bool, Query(description="Whether to send the events of a background response.")] = False,
    starting_after: Annotated[
        int, Query(ge=-1, le=2**31, description="With stream: number of the last event that the client has.")
    ] = -1,
) -> Response:
    """A stored response; with `stream=true` its events after number `starting_after`."""
    found = await caller.store.response(caller.owner, response_id)
    if not stream:
        return _json(found.content)
    if not found.is_background:
        raise InvalidRequestError(
            "Only responses that were created with background=true have stored events. Leave out 'stream'.",
            param="stream",
        )
    return StreamResponse(replay(caller.store, caller.owner, response_id, starting_after))


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, caller: CallerDep) -> Response:
    """Delete a stored response; one that runs in the background ends."""
    await caller.store.delete_response(caller.owner, response_id)
    caller.state.runs.stop(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, caller: CallerDep) -> Response:
    """Cancel a response that runs in the background."""
    cancelled = await caller.store.cancel(caller.owner, response_id)
    caller.state.runs.stop(response_id)
    return _json(cancelled.content)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(response_id: str, caller: CallerDep, page: PageDep) -> Response:
    """The items that a response was generated from, those of earlier responses included."""
    items, has_more = await caller.store.input_items(caller.owner, response_id, page)
    return _list(items, has_more=has_more)


# ---- conversations --------------------------------------------------------------------------------------------------


class ConversationRequest(BaseModel):
    items: Annotated[list[dict[str, Any]], Field(max_length=MAX_NEW_ITEMS, fail_fast=True)] | None = None
    """Up to 20 items, as in `input` of /v1/responses."""
    metadata: dict[str, str] | None = None
    """Up to 16 names of at most 64 characters, with texts of at most 512."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _check_metadata(cls, value: Any) -> Any:
        return check_metadata(value)


async def _read(request: Request, *, may_be_empty: bool = False) -> tuple[ConversationRequest, list[Item]]:
    """The request and its items. Raises InvalidRequestError."""
    body = await request.body()
    bounds = RequestBounds()
    fields = read_fields(body if body or not may_be_empty else b"{}", bounds, ConversationRequest.model_fields.keys())
    asked = validate(ConversationRequest, fields, bounds)
    if not asked.items:
        return asked, []
    try:
        ItemTranslator(bounds).add_all(asked.items)
    except InvalidRequestError as error:
        raise renamed(error, {"input": "items"}) from error
    return asked, input_items(msgspec.json.encode(asked.items))


def _required(items: Sequence[Item]) -> None:
    if not items:
        raise InvalidRequestError(
            f"Missing required field 'items': up to {MAX_NEW_ITEMS} items.",
            param="items",
            code="missing_required_parameter",
        )


@router.post(
    "/v1/conversations", openapi_extra=json_body(ConversationRequest, required=False), responses=may_refuse(404)
)
async def create_conversation(request: Request, caller: CallerDep) -> Response:
    """A new conversation, with up to 20 items."""
    asked, items = await _read(request, may_be_empty=True)
    return _json(await caller.store.create_conversation(caller.owner, asked.metadata or {}, items))


@router.get("/v1/conversations/{conversation_id}")
async def get_conversation(conversation_id: str, caller: CallerDep) -> Response:
    """One conversation, without its items."""
    return _json(await caller.store.conversation(caller.owner, conversation_id))


@router.post("/v1/conversations/{conversation_id}", openapi_extra=json_body(ConversationRequest))
async def update_conversation(conversation_id: str, request: Request, caller: CallerDep) -> Response:
    """Replace a conversation's metadata."""
    asked, _ = await _read(request)
    return _json(await caller.store.update_conversation(caller.owner, conversation_id, asked.metadata or {}))


@router.delete("/v1/conversations/{conversation_id}")
async def delete_conversation(conversation_id: str, caller: CallerDep) -> Response:
    """Delete a conversation. Its responses stay."""
    await caller.store.delete_conversation(caller.owner, conversation_id)
    return _json({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


@router.get("/v1/conversations/{conversation_id}/items")
async def list_items(conversation_id: str, caller: CallerDep, page: PageDep) -> Response:
    """The items of a conversation."""
    items, has_more = page.of(await caller.store.conversation_items(caller.owner, conversation_id))
    return _list(items, has_more=has_more)


@router.post("/v1/conversations/{conversation_id}/items", openapi_extra=json_body(ConversationRequest))
async def add_items(conversation_id: str, request: Request, caller: CallerDep) -> Response:
    """Add up to 20 items to a conversation."""
    _, items = await _read(request)
    _required(items)
    await caller.store.append_items(caller.owner, conversation_id, items)
    return _list(items, has_more=False)


@router.get("/v1/conversations/{conversation_id}/items/{item_id}")
async def get_item(conversation_id: str, item_id: str, caller: CallerDep) -> Response:
    """One item of a conversation."""
    for item in await caller.store.conversation_items(caller.owner, conversation_id):
        if item.id == item_id:
            return _json(item.content)
    raise not_found("Item", item_id)


@router.delete("/v1/conversations/{conversation_id}/items/{item_id}")
async def delete_item(conversation_id: str, item_id: str, caller: CallerDep) -> Response:
    """Delete an item of a conversation, which is returned."""
    return _json(await caller.store.delete_item(caller.owner, conversation_id, item_id))
