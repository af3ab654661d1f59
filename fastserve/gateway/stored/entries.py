"""The store: responses and conversations with their items and events, each of which belongs to one API key."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from fastserve.errors import BodyTooLargeError, EntryNotFoundError, InvalidRequestError
from fastserve.gateway.stored.database import Database
from fastserve.gateway.stored.items import Item, output_items
from fastserve.observability.text import printable
from fastserve.openai.body import shown
from fastserve.openai.responses.answer import RUNNING, event
from fastserve.openai.responses.head import ResponseHead, new_id

STALE_S = 15.0
"""Silence of a response that runs in the background after which its API server is taken to be gone."""
MAX_EVENTS_AT_ONCE = 512
_RESPONSE, _CONVERSATION = "response", "conversation"


@dataclass(frozen=True)
class NewResponse:
    owner: str
    head: ResponseHead
    content: bytes
    """JSON of the response object."""
    items: Sequence[Item]
    """Input items that its request has sent."""
    previous: str | None = None
    conversation: str | None = None
    """Ids of what its request refers to."""


@dataclass(frozen=True)
class StoredResponse:
    id: str
    status: str
    content: bytes
    """JSON of the response object."""
    previous: str | None
    conversation: str | None
    is_background: bool

    @property
    def is_running(self) -> bool:
        return self.status in RUNNING


@dataclass(frozen=True)
class Page:
    """A page of a list: at most `limit` items behind the item `after`, in ascending or descending order."""

    after: str | None = None
    limit: int = 20
    is_ascending: bool = False

    def of(self, items: Sequence[Item]) -> tuple[list[Item], bool]:
        """The items of the page, and whether more follow. Raises InvalidRequestError for an unknown `after`."""
        ordered = list(items) if self.is_ascending else list(reversed(items))
        first = 0
        if self.after is not None:
            first = next((at + 1 for at, item in enumerate(ordered) if item.id == self.after), 0)
            if not first:
                raise InvalidRequestError(
                    f"Invalid value for 'after': {shown(self.after)}. Give the id of an item of this list.",
                    param="after",
                )
        return ordered[first : first + self.limit], len(ordered) > first + self.limit


def not_found(kind: str, entry_id: str, param: str | None = None) -> EntryNotFoundError:
    return EntryNotFoundError(
        f"{kind} with id '{printable(entry_id, 80)}' not found. It may be another API key's, or have been deleted.",
        param=param,
    )


class Store:
    def __init__(self, database: Database, max_context_bytes: int) -> None:
        """`max_context_bytes`: maximum size of the items that a request refers to."""
        self._database = database
        self._max_context_bytes = max_context_bytes

    # ---- responses ----------------------------------------------------------------------------------------------

    async def save(self, new: NewResponse) -> None:
        """Store a response that has ended, and add its items to its conversation. If its request has store=false, only
        the latter.
        """

        def work(connection: sqlite3.Connection) -> None:
            status, outputs = _status(new.content), output_items(new.content)
            if new.head.is_stored:
                self._insert(connection, new, status, _size(outputs))
                _add_items(connection, new.head.id, (), outputs, len(new.items))
            if new.conversation is not None and status != "failed":
                _append(connection, new.owner, new.conversation, [*new.items, *outputs])

        await self._database.run(work)

    async def begin(self, new: NewResponse, events: Sequence[bytes]) -> None:
        """Store a response that is going to run in the background, with its first events."""

        def work(connection: sqlite3.Connection) -> None:
            self._insert(connection, new, "queued", sum(map(len, events)), self._database.clock())
            _add_events(connection, new.head.id, 0, events)

        await self._database.run(work)

    def _insert(
        self,
        connection: sqlite3.Connection,
        new: NewResponse,
        status: str,
        more_bytes: int,
        alive_at: float | None = None,
    ) -> None:
        """Insert an entry with its input. `more_bytes`: size of what is stored with it besides."""
        head, now = new.head, self._database.clock()
        size = len(new.content) + _size(new.items) + more_bytes
        row = (head.id, _RESPONSE, new.owner, head.created_at, now, size, status, alive_at)
        connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, new.previous, new.conversation, new.content),
        )
        _add_items(connection, head.id, new.items, ())

    async def progress(
        self, owner: str, response_id: str, content: bytes, first_number: int, events: Sequence[bytes]
    ) -> bool:
        """Store more events of a response that runs in the background, and its newest object. At its end, its items
        are added to its conversation.

        Returns whether it is still to run: it may have been cancelled or deleted.
        """

        def work(connection: sqlite3.Connection) -> bool:
            row = _find(connection, owner, response_id)
            if row is None or not row.is_running:
                return False
            status = _status(content)
            outputs = [] if status in RUNNING else output_items(content)
            growth = len(content) - len(row.content) + sum(map(len, events)) + _size(outputs)
            now = self._database.clock()
            connection.execute(
                "UPDATE entries SET content = ?, status = ?, size = size + ?, alive_at = ?, used_at = ? WHERE id = ?",
                (content, status, growth, now, now, response_id),
            )
            _add_events(connection, response_id, first_number, events)
            if status not in RUNNING:
                own = _items(connection, response_id)
                _add_items(connection, response_id, (), outputs, len(own))
                if row.conversation is not None and status != "failed":
                    _append(connection, owner, row.conversation, [*own, *outputs])
            return True

        return await self._database.run(work)

    async def note_alive(self, response_ids: Sequence[str]) -> list[str]:
        """Note that these run. Returns those that do not any more, since they were cancelled or deleted."""

        def work(connection: sqlite3.Connection) -> list[str]:
            now, ended = self._database.clock(), []
            for response_id in response_ids:
                found = connection.execute(
                    "UPDATE entries SET alive_at = ? WHERE id = ? AND status IN ('queued', 'in_progress')",
                    (now, response_id),
                )
                if not found.rowcount:
                    ended.append(response_id)
            return ended

        return await self._database.run(work)

    async def response(self, owner: str, response_id: str) -> StoredResponse:
        """Raises EntryNotFoundError."""
        return await self._database.run(
            lambda connection: self._response(connection, owner, response_id), may_be_lost=True
        )

    async def delete_response(self, owner: str, response_id: str) -> None:
        """Raises EntryNotFoundError."""
        await self._database.run(lambda connection: _delete(connection, owner, _RESPONSE, response_id))

    async def cancel(self, owner: str, response_id: str) -> StoredResponse:
        """Cancel a response that runs in the background. Raises EntryNotFoundError, and InvalidRequestError for a
        response that was not created in the background.
        """

        def work(connection: sqlite3.Connection) -> StoredResponse:
            found = self._response(connection, owner, response_id)
            if not found.is_background:
                raise InvalidRequestError(
                    "Only responses that were created with background=true can be cancelled. To end another one, close "
                    "its connection.",
                    param="response_id",
                )
            if not found.is_running:
                return found
            content = msgspec.json.encode(msgspec.json.decode(found.content) | {"status": "cancelled"})
            connection.execute(
                "UPDATE entries SET status = 'cancelled', content = ? WHERE id = ?", (content, response_id)
            )
            return self._response(connection, owner, response_id)

        return await self._database.run(work)

    async def events(self, owner: str, response_id: str, after: int) -> tuple[list[tuple[int, bytes]], bool]:
        """The next events behind number `after`, and whether no more will come. Raises EntryNotFoundError."""

        def work(connection: sqlite3.Connection) -> tuple[list[tuple[int, bytes]], bool]:
            found = self._response(connection, owner, response_id)
            rows = connection.execute(
                "SELECT number, content FROM events WHERE entry = ? AND number > ? ORDER BY number LIMIT ?",
                (response_id, after, MAX_EVENTS_AT_ONCE),
            ).fetchall()
            return rows, not found.is_running and len(rows) < MAX_EVENTS_AT_ONCE

        return await self._database.run(work, may_be_lost=True)

    async def context(self, owner: str, response_id: str) -> list[Item]:
        """The items of a response and of those before it, oldest first: what comes before the input of the next one.

        Raises EntryNotFoundError, BodyTooLargeError, and InvalidRequestError for a response that has not ended.
        """

        def work(connection: sqlite3.Connection) -> list[Item]:
            param = "previous_response_id"
            found = self._response(connection, owner, response_id, param)
            if found.is_running:
                raise InvalidRequestError(
                    f"Invalid value for '{param}': {shown(response_id)}. It is {found.status}; wait for its end.",
                    param=param,
                )
            return self._chain(connection, owner, found, param)

        return await self._database.run(work, may_be_lost=True)

    async def input_items(self, owner: str, response_id: str, page: Page) -> tuple[list[Item], bool]:
        """Items that a response was generated from. Raises EntryNotFoundError and InvalidRequestError."""

        def work(connection: sqlite3.Connection) -> tuple[list[Item], bool]:
            found = self._response(connection, owner, response_id)
            before: list[Item] = []
            if found.previous is not None:
                previous = _find(connection, owner, found.previous)
                before = [] if previous is None else self._chain(connection, owner, previous, "response_id")
            own = _items(connection, response_id, "AND NOT is_output")
            return page.of([*before, *own])

        return await self._database.run(work, may_be_lost=True)

    async def find_items(self, owner: str, item_ids: Iterable[str]) -> dict[str, bytes]:
        """The stored ones among these items, by id."""

        def work(connection: sqlite3.Connection) -> dict[str, bytes]:
            found = {}
            for item_id in item_ids:
                row = connection.execute(
                    "SELECT items.content FROM items JOIN entries ON entries.id = entry "
                    "WHERE items.id = ? AND owner = ? LIMIT 1",
                    (item_id, owner),
                ).fetchone()
                if row is not None:
                    found[item_id] = row[0]
            return found

        return await self._database.run(work, writes=False)

    def _response(
        self, connection: sqlite3.Connection, owner: str, response_id: str, param: str | None = None
    ) -> StoredResponse:
        found = _find(connection, owner, response_id)
        if found is None:
            raise not_found("Response", response_id, param)
        now = self._database.clock()
        connection.execute("UPDATE entries SET used_at = ? WHERE id = ?", (now, response_id))
        stale = connection.execute(
            "SELECT 1 FROM entries WHERE id = ? AND status IN ('queued', 'in_progress') AND alive_at < ?",
            (response_id, now - STALE_S),
        ).fetchone()
        if stale is None:
            return found
        message = "The API server that worked on this response was stopped. Send the request again."
        failed = msgspec.json.decode(found.content) | {
            "status": "failed",
            "error": {"code": "server_error", "message": message},
        }
        content = msgspec.json.encode(failed)
        (last,) = connection.execute("SELECT max(number) FROM events WHERE entry = ?", (response_id,)).fetchone()
        number = 0 if last is None else last + 1
        _add_events(connection, response_id, number, [event("response.failed", number, {"response": failed})])
        connection.execute("UPDATE entries SET status = 'failed', content = ? WHERE id = ?", (content, response_id))
        return StoredResponse(response_id, "failed", content, found.previous, found.conversation, is_background=True)

    def _chain(self, connection: sqlite3.Connection, owner: str, last: StoredResponse, param: str) -> list[Item]:
        groups: list[list[Item]] = []
        found: StoredResponse | None = last
        size = 0
        while found is not None:
            if found.conversation is not None:
                raise InvalidRequestError(
                    f"Invalid value for '{param}': {shown(found.id)}. It belongs to a conversation: give "
                    f"'conversation': {shown(found.conversation)} instead.",
                    param=param,
                )
            items = _items(connection, found.id)
            size += _size(items)
            if size > self._max_context_bytes:
                raise BodyTooLargeError(
                    f"The responses before this one have more than {self._max_context_bytes} bytes (--max-body-bytes). "
                    "Begin anew, with a summary as input.",
                    param=param,
                )
            groups.append(items)
            connection.execute("UPDATE entries SET used_at = ? WHERE id = ?", (self._database.clock(), found.id))
            if found.previous is None:
                break
            previous = found.previous
            found = _find(connection, owner, previous)
            if found is None:
                raise not_found("A response before it,", previous, param)
        return [item for items in reversed(groups) for item in items]

    # ---- conversations ------------------------------------------------------------------------------------------

    async def create_conversation(self, owner: str, metadata: dict[str, str], items: Sequence[Item]) -> dict[str, Any]:
        now = self._database.clock()
        made = {"id": new_id("conv"), "object": "conversation", "created_at": int(now), "metadata": metadata}
        content = msgspec.json.encode(made)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, '', NULL, NULL, NULL, ?)",
                (made["id"], _CONVERSATION, owner, made["created_at"], now, len(content), content),
            )
            _append(connection, owner, str(made["id"]), items)

        await self._database.run(work)
        return made

    async def conversation(self, owner: str, conversation_id: str) -> dict[str, Any]:
        """Raises EntryNotFoundError."""
        return await self._database.run(
            lambda connection: self._conversation(connection, owner, conversation_id), may_be_lost=True
        )

    async def update_conversation(self, owner: str, conversation_id: str, metadata: dict[str, str]) -> dict[str, Any]:
        """Raises EntryNotFoundError."""

        def work(connection: sqlite3.Connection) -> dict[str, Any]:
            changed = self._conversation(connection, owner, conversation_id) | {"metadata": metadata}
            content = msgspec.json.encode(changed)
            connection.execute("UPDATE entries SET content = ? WHERE id = ?", (content, conversation_id))
            return changed

        return await self._database.run(work)

    async def delete_conversation(self, owner: str, conversation_id: str) -> None:
        """Raises EntryNotFoundError."""
        await self._database.run(lambda connection: _delete(connection, owner, _CONVERSATION, conversation_id))

    async def append_items(self, owner: str, conversation_id: str, items: Sequence[Item]) -> None:
        """Raises EntryNotFoundError, and BodyTooLargeError if the conversation would be too long."""
        await self._database.run(lambda connection: self._add_new_items(connection, owner, conversation_id, items))

    async def conversation_items(self, owner: str, conversation_id: str) -> list[Item]:
        """All items, oldest first. Raises EntryNotFoundError."""

        def work(connection: sqlite3.Connection) -> list[Item]:
            self._conversation(connection, owner, conversation_id)
            return _items(connection, conversation_id)

        return await self._database.run(work, may_be_lost=True)

    async def conversation_context(self, owner: str, conversation_id: str) -> list[Item]:
        """All items, as those before the input of a request. Raises EntryNotFoundError and BodyTooLargeError."""

        def work(connection: sqlite3.Connection) -> list[Item]:
            self._conversation(connection, owner, conversation_id, "conversation")
            items = _items(connection, conversation_id)
            self._check_size(items, "conversation")
            return items

        return await self._database.run(work, may_be_lost=True)

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> dict[str, Any]:
        """Returns the conversation. Raises EntryNotFoundError."""

        def work(connection: sqlite3.Connection) -> dict[str, Any]:
            found = self._conversation(connection, owner, conversation_id)
            removed = connection.execute(
                "DELETE FROM items WHERE entry = ? AND id = ? RETURNING length(content)", (conversation_id, item_id)
            ).fetchall()
            if not removed:
                raise not_found("Item", item_id)
            size = sum(length for (length,) in removed)
            connection.execute("UPDATE entries SET size = size - ? WHERE id = ?", (size, conversation_id))
            return found

        return await self._database.run(work)

    def _conversation(
        self, connection: sqlite3.Connection, owner: str, conversation_id: str, param: str | None = None
    ) -> dict[str, Any]:
        row = connection.execute(
            "UPDATE entries SET used_at = ? WHERE id = ? AND owner = ? AND kind = ? RETURNING content",
            (self._database.clock(), conversation_id, owner, _CONVERSATION),
        ).fetchone()
        if row is None:
            raise not_found("Conversation", conversation_id, param)
        found: dict[str, Any] = msgspec.json.decode(row[0])
        return found

    def _add_new_items(
        self, connection: sqlite3.Connection, owner: str, conversation_id: str, items: Sequence[Item]
    ) -> None:
        self._conversation(connection, owner, conversation_id)
        _append(connection, owner, conversation_id, items)
        self._check_size(_items(connection, conversation_id), "conversation")

    def _check_size(self, items: Sequence[Item], param: str) -> None:
        """Raises BodyTooLargeError."""
        if _size(items) > self._max_context_bytes:
            raise BodyTooLargeError(
                f"The conversation has more than {self._max_context_bytes} bytes (--max-body-bytes). Delete some of "
                "its items, or begin another one.",
                param=param,
            )


def _append(connection: sqlite3.Connection, owner: str, conversation_id: str, items: Sequence[Item]) -> None:
    """Add items to a conversation; if it has been deleted, nothing happens."""
    grown = connection.execute(
        "UPDATE entries SET size = size + ? WHERE id = ? AND owner = ? AND kind = ?",
        (_size(items), conversation_id, owner, _CONVERSATION),
    )
    if grown.rowcount:
        (first,) = connection.execute(
            "SELECT coalesce(max(position) + 1, 0) FROM items WHERE entry = ?", (conversation_id,)
        ).fetchone()
        _add_items(connection, conversation_id, items, (), first)


def _find(connection: sqlite3.Connection, owner: str, response_id: str) -> StoredResponse | None:
    row = connection.execute(
        "SELECT id, status, content, previous, conversation, alive_at FROM entries "
        "WHERE id = ? AND owner = ? AND kind = ?",
        (response_id, owner, _RESPONSE),
    ).fetchone()
    if row is None:
        return None
    found, status, content, previous, conversation, alive_at = row
    return StoredResponse(found, status, content, previous, conversation, is_background=alive_at is not None)


def _delete(connection: sqlite3.Connection, owner: str, kind: str, entry_id: str) -> None:
    removed = connection.execute("DELETE FROM entries WHERE id = ? AND owner = ? AND kind = ?", (entry_id, owner, kind))
    if not removed.rowcount:
        raise not_found(kind.capitalize(), entry_id)


def _items(connection: sqlite3.Connection, entry: str, condition: str = "") -> list[Item]:
    rows = connection.execute(f"SELECT id, content FROM items WHERE entry = ? {condition} ORDER BY position", (entry,))
    return [Item(*row) for row in rows]


def _add_items(
    connection: sqlite3.Connection, entry: str, items: Sequence[Item], outputs: Sequence[Item], first: int = 0
) -> None:
    both = [*((item, 0) for item in items), *((item, 1) for item in outputs)]
    connection.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
        [(entry, first + at, item.id, is_output, item.content) for at, (item, is_output) in enumerate(both)],
    )


def _add_events(connection: sqlite3.Connection, entry: str, first: int, events: Sequence[bytes]) -> None:
    connection.executemany(
        "INSERT INTO events VALUES (?, ?, ?)", [(entry, first + at, content) for at, content in enumerate(events)]
    )


def _size(items: Iterable[Item]) -> int:
    return sum(len(item.content) for item in items)


class _Status(msgspec.Struct):
    status: str


def _status(content: bytes) -> str:
    return msgspec.json.decode(content, type=_Status).status
