"""Messages that are out of bounds: an error that names the field, at little cost, and nothing known is lost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from fastserve.config import ControllerConfig
from fastserve.control.app import create_app
from fastserve.protocol import (
    MAX_EXCLUDED,
    MAX_LEASE_CHARS,
    MAX_LEASES,
    MAX_MODEL_NAMES,
    MAX_NAME_CHARS,
    MAX_RELEASES,
)
from tests.keys import UNGUARDED

ADDRESS = "http://w:1"
JSON = {"content-type": "application/json"}
STATUS = {"model_names": ["m"], "heartbeat_interval_s": 60.0, "tokens_per_s": 10.0}
BEAT: dict[str, Any] = {"worker_name": ADDRESS, "queue_length": 0}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    bounds: dict[str, Any] = {"max_workers": 3, "max_model_names": 5, "max_leases": 4, "model_memory_s": 60.0}
    app = create_app(ControllerConfig(**UNGUARDED, **bounds))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", headers=JSON) as client,
    ):
        await client.post("/receive_heart_beat", json=BEAT | {"status": STATUS})
        yield client


async def table(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await client.get("/workers")).json()["workers"]
    return rows


async def refused(client: httpx.AsyncClient, path: str, body: str, field: str) -> str:
    response = await client.post(path, content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert f"'{field}'" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400
    assert error["message"].isprintable()
    assert "Input should" not in error["message"]
    return str(error["message"])


NUMBERS = ["speed", "kv_usage", "tokens_per_s", "queue_length", "heartbeat_interval_s", "context_length"]
WRONG_NUMBERS = ["NaN", "-Infinity", "1e999", "7" * 400, "-" + "7" * 400, "-0.5", '"2"', "true", "[1]", "{}"]


@pytest.mark.parametrize("field", [*NUMBERS, "max_concurrency"])
@pytest.mark.parametrize("number", WRONG_NUMBERS)
async def test_a_number_out_of_range_is_refused_by_name_and_the_worker_stays_as_it_was(
    client: httpx.AsyncClient, field: str, number: str
) -> None:
    before = await table(client)
    status = json.dumps(STATUS | {field: "NUMBER"}).replace('"NUMBER"', number)
    body = json.dumps(BEAT | {"status": "STATUS"}).replace('"STATUS"', status)
    await refused(client, "/receive_heart_beat", body, f"status.{field}")
    register = json.dumps({"worker_name": ADDRESS, "check_heart_beat": True, "worker_status": "STATUS"})
    await refused(client, "/register_worker", register.replace('"STATUS"', status), f"worker_status.{field}")
    assert await table(client) == before
    assert (await client.post("/acquire", json={"model": "m", "lease": "1"})).json()["address"] == ADDRESS
    assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("status", "field"),
    [
        ({"model_names": ["m"] * (MAX_MODEL_NAMES + 1)}, "status.model_names"),
        ({"model_names": ["m" * (MAX_NAME_CHARS + 1)]}, "status.model_names.0"),
        ({"model_names": ["m", ""]}, "status.model_names.1"),
        ({"model_names": ["m\nforged line"]}, "status.model_names.0"),
        ({"model_names": ["\x1b[2Jm"]}, "status.model_names.0"),
        ({"model_names": ["txt.‮exe"]}, "status.model_names.0"),
        ({"model_names": ["m\u2028m"]}, "status.model_names.0"),
        ({"model_names": "m"}, "status.model_names"),
        ({"model_names": ["m"], "leases": ["x"] * (MAX_LEASES + 1)}, "status.leases"),
        ({"model_names": ["m"], "leases": ["x" * (MAX_LEASE_CHARS + 1)]}, "status.leases.0"),
        ({"model_names": ["m"], "version": "v" * 65}, "status.version"),
        ({"model_names": ["m"], "ready": 1}, "status.ready"),
        ({}, "status.model_names"),
        ([], "status"),
    ],
)
async def test_a_name_or_list_out_of_bounds_is_refused_by_name(
    client: httpx.AsyncClient, status: Any, field: str
) -> None:
    before = await table(client)
    await refused(client, "/receive_heart_beat", json.dumps(BEAT | {"status": status}), field)
    assert await table(client) == before


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/acquire", {"model": "m", "lease": ""}, "lease"),
        ("/acquire", {"model": "m", "lease": "1", "exclude": ["a"] * (MAX_EXCLUDED + 1)}, "exclude"),
        ("/acquire", {"model": "m", "lease": "1", "exclude": ["a" * 301]}, "exclude.0"),
        ("/acquire", {"model": ["m"], "lease": "1"}, "model"),
        ("/release", {"leases": ["x"] * (MAX_RELEASES + 1)}, "leases"),
        ("/release", {"leases": [], "failed": [1]}, "failed.0"),
        ("/release", {"leases": [], "unused": "all"}, "unused"),
        ("/serving", {"leases": {}}, "leases"),
        ("/report_failure", {"worker_name": "w\r\n"}, "worker_name"),
        ("/deregister_worker", {"worker_name": "w" * 301}, "worker_name"),
        ("/receive_heart_beat", {"worker_name": "‭w", "queue_length": 0}, "worker_name"),
        ("/register_worker", {"worker_name": "w", "check_heart_beat": "yes"}, "check_heart_beat"),
    ],
)
async def test_each_message_has_bounds(client: httpx.AsyncClient, path: str, body: Any, field: str) -> None:
    await refused(client, path, json.dumps(body), field)


@pytest.mark.parametrize("path", ["/acquire", "/release", "/receive_heart_beat"])
@pytest.mark.parametrize("body", ["", "nonsense", "[]", "null", "[" * 100_000, '{"model": "\\ud800"}', "7" * 5000])
async def test_a_body_that_is_no_message_is_refused(client: httpx.AsyncClient, path: str, body: str) -> None:
    response = await client.post(path, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/acquire", {"model": "m", "lease": "1", "exclude": "LIST"}),
        ("/release", {"leases": "LIST"}),
        ("/release", {"leases": [], "failed": "LIST", "unused": "LIST"}),
        ("/receive_heart_beat", BEAT | {"status": {"model_names": "LIST", "leases": "LIST"}}),
    ],
)
async def test_a_list_of_a_million_wrong_elements_costs_little(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body).replace('"LIST"', "[" + ",".join("0" * 1_000_000) + "]").encode()
    began = time.process_time()
    response = await client.post(path, content=content)
    assert response.status_code == 400
    # A million error objects would take seconds.
    assert time.process_time() - began < 1.0


async def test_fastchats_messages_are_understood(client: httpx.AsyncClient) -> None:
    status = {"model_names": ["vicuna"], "speed": 1, "queue_length": 0, "what": {"FastChat": "adds"}}
    body = {"worker_name": "http://f:1", "check_heart_beat": True, "worker_status": status, "multimodal": False}
    assert (await client.post("/register_worker", json=body)).json() is None
    beat = {"worker_name": "http://f:1", "queue_length": 3}
    assert (await client.post("/receive_heart_beat", json=beat)).json() == {"exist": True}
    assert (await client.post("/get_worker_address", json={"model": "vicuna"})).json() == {"address": "http://f:1"}


async def test_refused_messages_are_counted_and_logged_without_control_characters(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "w\n2026-01-01 | INFO | all is well\x1b[31m‮"
    for _ in range(50):
        await client.post("/deregister_worker", json={"worker_name": forged})
    (record,) = [record for record in caplog.records if "refused" in record.getMessage()]
    assert record.getMessage().isprintable()
    assert "/deregister_worker" in record.getMessage()
    assert "fastserve_controller_bad_messages_total 50.0" in (await client.get("/metrics")).text


async def test_names_in_the_log_are_escaped_and_shortened(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # No control characters, but they must not affect a terminal or fill a disk either.
    names = ["private\ue000", "back\\slash", "long" * 100]
    body = {"worker_name": ADDRESS, "queue_length": 0, "status": STATUS | {"model_names": names}}
    await client.post("/deregister_worker", json={"worker_name": ADDRESS})
    caplog.clear()
    assert (await client.post("/receive_heart_beat", json=body)).status_code == 200
    await client.post("/deregister_worker", json={"worker_name": body["worker_name"]})
    lines = [record.getMessage() for record in caplog.records if record.name == "fastserve.control.registry"]
    assert len(lines) == 2
    for line in lines:
        assert line.isprintable()
        assert "\\ue000" in line
        assert len(line) < 600


# ---- bounds on totals -------------------------------------------------------------------------------------------


async def heartbeat(client: httpx.AsyncClient, address: str, *names: str, **fields: Any) -> httpx.Response:
    status = STATUS | {"model_names": list(names)} | fields
    return await client.post("/receive_heart_beat", json={"worker_name": address, "queue_length": 0, "status": status})


async def test_too_many_workers_are_refused_and_the_known_ones_go_on(client: httpx.AsyncClient) -> None:
    for number in (2, 3):
        assert (await heartbeat(client, f"http://w:{number}", "m")).status_code == 200
    response = await heartbeat(client, "http://w:4", "m")
    assert response.status_code == 429
    assert "--max-workers" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1
    assert (await heartbeat(client, "http://w:3", "m")).status_code == 200
    assert len(await table(client)) == 3


async def test_too_many_names_are_refused_and_the_worker_keeps_those_it_had(client: httpx.AsyncClient) -> None:
    response = await heartbeat(client, ADDRESS, *(f"m{n}" for n in range(6)))
    assert response.status_code == 429
    assert "--max-model-names" in response.json()["error"]["message"]
    assert (await client.post("/list_models")).json() == {"models": ["m"]}
    assert (await heartbeat(client, ADDRESS, *(f"m{n}" for n in range(4)))).status_code == 200
    assert (await client.post("/list_models")).json() == {"models": ["m0", "m1", "m2", "m3"]}


async def test_too_many_leases_are_refused_and_those_that_workers_list_still_count(client: httpx.AsyncClient) -> None:
    for number in range(4):
        answer = await client.post("/acquire", json={"model": "m", "lease": f"x{number}"})
        assert answer.status_code == 200
    answer = await client.post("/acquire", json={"model": "m", "lease": "one more"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    await client.post("/release", json={"leases": ["x0"]})
    assert (await client.post("/acquire", json={"model": "m", "lease": "one more"})).status_code == 200
    listed = [f"listed{number}" for number in range(10)]
    answer = await heartbeat(client, "http://w:2", "n", leases=listed, queue_length=10)
    assert answer.status_code == 200
    in_flight = {row["address"]: row["in_flight"] for row in await table(client)}
    assert in_flight == {ADDRESS: 4, "http://w:2": 10}
