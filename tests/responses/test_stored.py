"""Stored responses: found again, continued, listed, deleted, run in the background, each by its own key alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import openai
import pydantic
import pytest

from fastserve.errors import EntryNotFoundError
from fastserve.gateway.stored import background, entries
from fastserve.gateway.stored.database import Database, StoreBounds
from fastserve.gateway.stored.entries import NewResponse, Store
from fastserve.gateway.stored.items import input_items
from fastserve.openai.responses.head import ResponseHead, new_id
from tests.responses.conftest import MODEL, Fleet, Item, until
from tests.responses.test_create import check_stream

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEPT = "the id of a stored response"
KEYS = ("sk-one", "sk-two")


def text_of(item: pydantic.BaseModel) -> Any:
    return item.model_dump()["content"][0]["text"]


async def until_ended(fleet: Fleet, response_id: str) -> Item:
    for _ in range(500):
        _, answer = await fleet.call("GET", f"/v1/responses/{response_id}")
        if answer["status"] not in ("queued", "in_progress"):
            return dict(answer)
        await asyncio.sleep(0.01)
    raise AssertionError(f"still {answer['status']}")


async def test_a_response_is_continued_by_its_id(fleet: Fleet) -> None:
    client = fleet.client()
    first = await client.responses.create(model=MODEL, input="My name is Ada.", instructions="Be brief.")
    async with client.responses.stream(
        model=MODEL, input=[{"role": "user", "content": "And mine?"}], previous_response_id=first.id
    ) as stream:
        async for event in stream:
            if event.type == "response.completed":  # at once, and by anybody
                assert (await client.responses.retrieve(event.response.id)).output_text == "Hello there."
        second = await stream.get_final_response()
    assert second.previous_response_id == first.id
    third = await client.responses.create(model=MODEL, input="Bye.", previous_response_id=second.id)
    prompt = fleet.talk.prompts[-1]
    said = ["My name is Ada.", "Hello there.", "And mine?", "Hello there.", "Bye."]
    places = [prompt.find(text) for text in ("My name is Ada.", "And mine?", "Bye.")]
    assert places == sorted(places)
    assert places[0] >= 0
    assert "Be brief." not in prompt
    assert prompt.count("Hello there.") == 2
    items = await client.responses.input_items.list(third.id, order="asc", limit=2)
    texts = [text_of(item) async for item in items]
    assert texts == said


async def test_a_function_is_called_and_its_output_sent_back(fleet: Fleet) -> None:
    tool: Any = {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
    hosted: Any = {"type": "web_search"}
    fleet.talk.text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    status, answer = await fleet.create(tools=[tool])
    if status == 400:
        assert answer["error"]["param"] == "tools"
        pytest.skip("tools are not supported")
    client = fleet.client()
    async with client.responses.stream(model=MODEL, input="Weather?", tools=[tool, hosted]) as stream:
        first = await stream.get_final_response()
    call: Any = first.output[0]
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Oslo"}')
    assert [listed.type for listed in first.tools] == ["function"]
    fleet.talk.text = "It is sunny."
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    last = await client.responses.create(model=MODEL, input=[output], tools=[tool], previous_response_id=first.id)
    assert last.output_text == "It is sunny."
    prompt = fleet.talk.prompts[-1]
    places = [prompt.rfind(text) for text in ("Weather?", "Oslo", "sunny")]
    assert places == sorted(places)
    assert places[0] >= 0
    output["call_id"] = "call_of_nobody"
    status, answer = await fleet.create(input=[output], tools=[tool], previous_response_id=first.id)
    assert (status, answer["error"]["param"]) == (400, "input.0.call_id")


async def test_items_are_referred_to_by_their_ids(fleet: Fleet) -> None:
    _, first = await fleet.create()
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    status, _ = await fleet.create(input=[reference, {"role": "user", "content": "again"}])
    assert status == 200
    assert "Hello there." in fleet.talk.prompts[-1]
    status, answer = await fleet.create(input=[{"type": "item_reference", "id": "msg_no"}])
    assert (status, answer["error"]["param"]) == (404, "input.0.id")


async def test_what_is_not_stored_is_not_found(fleet: Fleet) -> None:
    _, kept = await fleet.create()
    _, dropped = await fleet.create(store=False)
    assert (kept["store"], dropped["store"]) == (True, False)
    client = fleet.client()
    await client.responses.delete(kept["id"])
    for response_id in (kept["id"], dropped["id"], "resp_x", "%00", "x" * 3000):
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"), ("GET", "?stream=true"),
        ):  # fmt: skip
            status, answer = await fleet.call(method, f"/v1/responses/{response_id}{path}")
            assert (status, answer["error"]["code"]) == (404, "not_found"), (method, path)
        status, answer = await fleet.create(previous_response_id=response_id)
        assert (status, answer["error"]["param"]) == (404, "previous_response_id")


async def test_each_key_sees_its_own(fleet: Fleet) -> None:
    async with fleet.server(api_keys=KEYS, responses_store=fleet.store) as guarded:
        one, two = (guarded.client(key) for key in KEYS)
        mine = await one.responses.create(model=MODEL, input="hi")
        talk = await one.conversations.create()
        assert (await one.responses.retrieve(mine.id)).id == mine.id
        for request in (
            two.responses.retrieve(mine.id),
            two.responses.delete(mine.id),
            two.responses.cancel(mine.id),
            two.responses.create(model=MODEL, input="hi", previous_response_id=mine.id),
            two.responses.create(model=MODEL, input=[{"type": "item_reference", "id": mine.output[0].id or ""}]),
            two.responses.create(model=MODEL, input="hi", conversation=talk.id),
            two.conversations.retrieve(talk.id),
            two.conversations.delete(talk.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await request
        assert await one.conversations.retrieve(talk.id)


async def test_a_background_response_ends_without_its_client(fleet: Fleet) -> None:
    fleet.talk.slowly("one two three four five six seven", token_s=0.01)
    client = fleet.client()
    queued = await client.responses.create(model=MODEL, input="hi", background=True)
    assert queued.status == "queued"
    ended = await until_ended(fleet, queued.id)
    assert (ended["status"], ended["id"], ended["created_at"]) == ("completed", queued.id, queued.created_at)
    assert (await client.responses.retrieve(queued.id)).output_text == fleet.talk.text
    stream = await client.responses.create(model=MODEL, input="hi", background=True, stream=True)
    seen: list[Any] = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    response_id = seen[0].response.id
    last = seen[-1].sequence_number
    path = f"/v1/responses/{response_id}?stream=true"
    rest = await fleet.events(f"{path}&starting_after={last}", method="GET")
    assert [event["sequence_number"] for event in rest][:1] == [last + 1]
    whole = await fleet.events(path, method="GET")
    assert whole[last + 1 :] == rest
    assert [event["type"] for event in whole[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    check_stream(
        [
            whole[0],
            whole[2] | {"sequence_number": 1},
            *(e | {"sequence_number": e["sequence_number"] - 1} for e in whole[3:]),
        ]
    )
    status, _ = await fleet.create(previous_response_id=response_id)
    assert status == 200
    assert fleet.talk.text in fleet.talk.prompts[-1]


async def test_a_background_response_is_cancelled(fleet: Fleet) -> None:
    fleet.talk.slowly("word " * 200, token_s=0.05)
    client = fleet.client()
    running = await client.responses.create(model=MODEL, input="hi", background=True)
    status, answer = await fleet.create(previous_response_id=running.id)
    assert (status, answer["error"]["param"]) == (400, "previous_response_id")
    await until(lambda: fleet.worker.engine.stats.num_running == 1)
    assert (await client.responses.cancel(running.id)).status == "cancelled"
    await fleet.worker.idle()
    assert (await client.responses.retrieve(running.id)).status == "cancelled"
    again = await client.responses.create(model=MODEL, input="hi", background=True)
    await client.responses.delete(again.id)
    await fleet.worker.idle()
    _, whole = await fleet.create(max_output_tokens=16)
    status, answer = await fleet.call("POST", f"/v1/responses/{whole['id']}/cancel")
    assert status == 400
    assert "background" in answer["error"]["message"]


async def test_a_background_response_that_fails_says_why(fleet: Fleet) -> None:
    async with fleet.server(max_background_responses=1, responses_store=fleet.store) as server:
        image = {"role": "user", "content": [{"type": "input_image"}]}
        _, refused = await server.create(background=True, input=[image])
        ended = await until_ended(server, refused["id"])
        assert (ended["status"], ended["error"]["code"]) == ("failed", "invalid_prompt")
        assert "input_image" in ended["error"]["message"]
        events = await server.events(f"/v1/responses/{refused['id']}?stream=true", method="GET")
        assert [event["type"] for event in events] == ["response.created", "response.queued", "response.failed"]
        status, answer = await server.create(background=True, temperature=9)
        assert (status, answer["error"]["param"]) == (400, "temperature")
        status, answer = await server.create(background=True, store=False)
        assert (status, answer["error"]["param"]) == (400, "background")
        fleet.talk.slowly("word " * 100, token_s=0.02)
        _, running = await server.create(background=True)
        status, answer = await server.create(background=True)
        assert status == 429
        assert "--max-background-responses" in answer["error"]["message"]
        await until(lambda: fleet.worker.engine.stats.num_running == 1)
        fleet.worker.engine.die()
        ended = await until_ended(server, running["id"])
        assert (ended["status"], ended["error"]["code"]) == ("failed", "server_error")


async def test_api_servers_share_their_responses(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "ALIVE_INTERVAL_S", 0.05)
    async with fleet.server(responses_store=fleet.store) as other:
        fleet.talk.slowly("one two three four five six", token_s=0.02)
        _, running = await fleet.create(background=True)
        events = await other.events(f"/v1/responses/{running['id']}?stream=true", method="GET")
        assert events[-1]["type"] == "response.completed"
        assert (await other.create(previous_response_id=running["id"]))[0] == 200
        fleet.talk.slowly("word " * 200, token_s=0.05)
        _, running = await fleet.create(background=True)
        await until(lambda: fleet.worker.engine.stats.num_running == 1)
        _, answer = await other.call("POST", f"/v1/responses/{running['id']}/cancel")
        assert answer["status"] == "cancelled"
        await fleet.worker.idle()
        _, running = await other.create(background=True)
    _, answer = await fleet.call("GET", f"/v1/responses/{running['id']}")
    assert (answer["status"], answer["error"]["code"]) == ("failed", "server_error")
    assert "was stopped" in answer["error"]["message"]


async def test_conversations_keep_the_items_of_their_responses(fleet: Fleet) -> None:
    client = fleet.client()
    talk = await client.conversations.create(
        items=[{"role": "user", "content": "I am Ada."}], metadata={"topic": "names"}
    )
    assert talk.metadata == {"topic": "names"}
    first = await client.responses.create(model=MODEL, input="Who?", conversation=talk.id)
    assert first.conversation is not None
    assert first.conversation.id == talk.id
    async with client.responses.stream(model=MODEL, input="Again?", conversation={"id": talk.id}) as stream:
        await stream.get_final_response()
    prompt = fleet.talk.prompts[-1]
    assert prompt.find("I am Ada.") < prompt.find("Who?") < prompt.find("Hello there.") < prompt.find("Again?")
    queued = await client.responses.create(model=MODEL, input="Later?", conversation=talk.id, background=True)
    await until_ended(fleet, queued.id)
    listed = [item async for item in client.conversations.items.list(talk.id, limit=3, order="asc")]
    texts = [text_of(item) for item in listed]
    said = "Hello there."
    assert texts == ["I am Ada.", "Who?", said, "Again?", said, "Later?", said]
    more = await client.conversations.items.create(talk.id, items=[{"role": "user", "content": "More."}])
    (item,) = more.data
    item_id = str(item.id)
    assert (await client.conversations.items.retrieve(item_id, conversation_id=talk.id)).id == item_id
    await client.conversations.items.delete(item_id, conversation_id=talk.id)
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.retrieve(item_id, conversation_id=talk.id)
    changed = await client.conversations.update(talk.id, metadata={"topic": "other"})
    assert (await client.conversations.retrieve(talk.id)).metadata == changed.metadata == {"topic": "other"}
    status, answer = await fleet.create(previous_response_id=first.id)
    assert (status, answer["error"]["param"]) == (400, "previous_response_id")
    assert talk.id in answer["error"]["message"]
    assert (await client.conversations.delete(talk.id)).deleted
    status, answer = await fleet.create(conversation=talk.id)
    assert (status, answer["error"]["param"]) == (404, "conversation")


async def test_malformed_requests_name_field_value_and_remedy(fleet: Fleet) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("/v1/conversations", {"items": 5}, "items"),
        ("/v1/conversations", {"items": [{"role": "user"}]}, "items.0.content"),
        ("/v1/conversations", {"items": [{"type": "mystery"}]}, "items.0.type"),
        ("/v1/conversations", {"items": [{"role": "user", "content": "x"}] * 21}, "items"),
        ("/v1/conversations", {"metadata": {"a": 5}}, "metadata"),
        ("/v1/conversations", {"metadata": {"a": "b" * 513}}, "metadata"),
        ("/v1/responses", {"store": "yes"}, "store"),
        ("/v1/responses", {"background": 1}, "background"),
        ("/v1/responses", {"conversation": 5}, "conversation"),
        ("/v1/responses", {"conversation": {"name": "x"}}, "conversation"),
        ("/v1/responses", {"conversation": {"id": 5}}, "conversation"),
        ("/v1/responses", {"previous_response_id": KEPT, "input": None}, "input"),
        ("/v1/responses", {"previous_response_id": KEPT, "input": 5}, "input"),
        ("/v1/responses", {"previous_response_id": KEPT, "input": ["x"]}, "input.0"),
        ("/v1/responses", {"previous_response_id": KEPT, "input": [{"role": "user"}]}, "input.0.content"),
        ("/v1/responses", {"input": [{"type": "item_reference"}]}, "input.0.id"),
        ("/v1/conversations/x/items", {}, "items"),
        ("/v1/responses", {"previous_response_id": ["x"]}, "previous_response_id"),
        ("/v1/responses", {"conversation": "conv_x", "previous_response_id": "resp_x"}, "previous_response_id"),
    ]
    _, kept = await fleet.create()
    for path, fields, param in cases:
        if fields.get("previous_response_id") == KEPT:
            fields["previous_response_id"] = kept["id"]
        body = {"model": MODEL, "input": "hi", **fields} if path.endswith("responses") else fields
        status, answer = await fleet.call("POST", path, body)
        assert (status, answer["error"]["param"]) == (400, param), fields
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=msg_x"):
        status, answer = await fleet.call("GET", f"/v1/responses/{kept['id']}/input_items?{query}")
        assert (status, answer["error"]["param"].rpartition(".")[2]) == (400, query.partition("=")[0])
    status, answer = await fleet.call("GET", f"/v1/responses/{kept['id']}?stream=true")
    assert (status, answer["error"]["param"]) == (400, "stream")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"model": "fastserve-demo", "input": "hi", "temperature": NaN}',
        b'{"model": "fastserve-demo", "input": "hi", "temperature": 1e999}',
        b'{"model": "fastserve-demo", "input": "\\ud800"}',
        b'{"model": "fastserve-demo", "input": "\xff"}',
        b'{"model": "fastserve-demo", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "fastserve-demo", "input": [' + b"{}," * 100_000 + b"{}]}",
        b'{"model": "fastserve-demo", "input": "hi", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"model": "fastserve-demo", "input": "hi", "tools": "' + b"x" * 300_000 + b'"}',
        b'{"model": "fastserve-demo", "input": "hi", "background": true, "tools": "' + b"x" * 300_000 + b'"}',
        b'{"input": "hi"}',
    ],
)
async def test_bodies_that_are_no_request_are_refused(fleet: Fleet, body: bytes) -> None:
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        headers = {"content-type": "application/json"}
        async with fleet.http.post(fleet.url + path, data=body, headers=headers) as response:
            answer = await response.json()
            assert response.status == 400, (body[:80], answer)
            assert answer["error"]["message"]
    assert (await fleet.create())[0] == 200


async def test_many_at_once_are_all_stored(fleet: Fleet) -> None:
    client = fleet.client()
    made = await asyncio.gather(*(client.responses.create(model=MODEL, input=f"number {n}") for n in range(40)))
    found = await asyncio.gather(*(client.responses.retrieve(response.id) for response in made))
    assert [response.output for response in found] == [response.output for response in made]
    again = await asyncio.gather(
        *(client.responses.create(model=MODEL, input="on", previous_response_id=response.id) for response in made)
    )
    assert len({response.id for response in again}) == 40


async def test_a_client_that_leaves_ends_its_response_which_is_not_stored(fleet: Fleet) -> None:
    fleet.talk.slowly("word " * 200, token_s=0.05)
    stream = await fleet.client().responses.create(model=MODEL, input="hi", stream=True)
    first: Any = await anext(aiter(stream))
    await stream.close()
    await fleet.worker.idle()
    assert (await fleet.call("GET", f"/v1/responses/{first.response.id}"))[0] == 404


async def test_without_a_store_what_needs_one_is_refused(fleet: Fleet) -> None:
    async with fleet.server(responses_store="none") as server:
        status, answer = await server.create(store=True)
        assert (status, answer["store"]) == (200, False)
        for name, value in (("background", True), ("previous_response_id", "resp_x"), ("conversation", "conv_x")):
            status, answer = await server.create(**{name: value})
            assert (status, answer["error"]["param"]) == (400, name)
            assert "--responses-store" in answer["error"]["message"]
        assert (await server.call("GET", "/v1/responses/resp_x"))[0] == 404


# ---- the store by itself --------------------------------------------------------------------------------------------


def content(head: ResponseHead, text: str = "x") -> bytes:
    items = [{"type": "message", "id": new_id("msg"), "role": "assistant", "content": text}]
    return msgspec.json.encode({"id": head.id, "status": "completed", "output": items})


def make_head() -> ResponseHead:
    return ResponseHead(new_id("resp"), 1, is_stored=True)


async def save(store: Store, head: ResponseHead, text: str = "x") -> None:
    await store.save(NewResponse("", head, content(head, text), input_items(b'"hi"')))


async def kept(store: Store, heads: list[ResponseHead]) -> list[bool]:
    found = []
    for head in heads:
        try:
            await store.response("", head.id)
        except EntryNotFoundError:
            found.append(False)
        else:
            found.append(True)
    return found


async def test_the_store_is_bounded_in_number_bytes_and_age(tmp_path: Path) -> None:
    now = 1000.0
    database = Database(tmp_path / "a", StoreBounds(3, 10_000, 100), lambda: now)
    try:
        store = Store(database, 10**6)
        heads = [make_head() for _ in range(4)]
        for head in heads[:3]:
            await save(store, head)
            now += 1
        await store.response("", heads[0].id)  # used now
        await save(store, heads[3])
        assert await kept(store, heads) == [True, False, True, True]
        now += 1
        large = make_head()
        await save(store, large, "y" * 4500)
        assert await kept(store, [*heads, large]) == [False] * 4 + [True]
        now += 101
        last = make_head()
        await save(store, last)
        assert await kept(store, [*heads, last]) == [False] * 4 + [True]
        totals = await database.run(lambda connection: connection.execute("SELECT * FROM totals").fetchall())
        sizes = await database.run(lambda c: c.execute("SELECT count(*), sum(size) FROM entries").fetchall())
        assert totals == sizes
        rows = await database.run(lambda c: c.execute("SELECT count(*) FROM items").fetchone())
        assert rows == (2,)
    finally:
        database.close()


async def test_processes_share_the_file_and_a_response_of_one_that_died_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    databases = [Database(tmp_path / "a", StoreBounds(10, 10**6, 1000), lambda: now) for _ in range(2)]
    try:
        first, second = (Store(database, 10**6) for database in databases)
        head = make_head()
        queued = msgspec.json.encode({"id": head.id, "status": "queued", "output": []})
        await first.begin(NewResponse("", head, queued, input_items(b'"hi"')), [b"0", b"1"])
        assert (await second.response("", head.id)).status == "queued"
        now += entries.STALE_S - 1
        assert await first.note_alive([head.id]) == []
        now += entries.STALE_S - 1
        assert (await second.response("", head.id)).status == "queued"
        now += 2
        found = await second.response("", head.id)
        assert found.status == "failed"
        assert b"was stopped" in found.content
        assert await first.note_alive([head.id]) == [head.id]
        assert not await first.progress("", head.id, queued, 2, [b"2"])
        monkeypatch.setattr(background, "POLL_INTERVAL_S", 0.0)
        events = b"".join([piece async for piece in background.replay(second, "", head.id, 0)])
        assert events.startswith(b"1event: response.failed")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    finally:
        for database in databases:
            database.close()
