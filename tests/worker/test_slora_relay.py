"""S-LoRA's routes at the API server: `lora_dir` decides where a request goes, and the worker's bytes are passed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.fake import Script
from fastserve.errors import InvalidAnswerError
from fastserve.gateway.apis.slora import SLORA
from fastserve.gateway.events import EventStream
from tests.worker.conftest import MODEL, RunWorker
from tests.worker.test_adapters import make_adapter, say_adapter
from tests.worker.test_adapters_of_a_fleet import Fleet, started

__all__ = ["say_adapter"]


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two folders with the adapter `a`, and one adapter each."""
    made = [tmp_path / "first", tmp_path / "second"]
    for number, root in enumerate(made):
        make_adapter(root / "a")
        make_adapter(root / f"only{number}")
    return made


async def raw(fleet: Fleet, url: str, path: str, body: Any) -> tuple[int, str, bytes]:
    async with fleet.http.post(url + path, json=body) as response:
        return response.status, response.headers["content-type"], await response.read()


async def test_answers_are_the_workers(run_worker: RunWorker, roots: list[Path], say_adapter: Script) -> None:
    async with started(run_worker, roots[:1], script=say_adapter) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL, "only0": MODEL})
        bodies: list[dict[str, Any]] = [
            {},
            {"lora_dir": None},
            {"lora_dir": "a"},
            {"lora_dir": "a", "model": MODEL},
            {"model": f"{MODEL}:only0"},
            {"parameters": {"return_details": True, "max_new_tokens": 2}},
            {"lora_dir": 5},
            {"inputs": 5},
            {"parameters": {"zap": 1}},
        ]
        for fields in bodies:
            for path in ("/generate", "/generate_stream"):
                body = {"inputs": "hello", **fields}
                expected = await raw(fleet, fleet.workers[0].url, path, body)
                assert await raw(fleet, fleet.url, path, body) == expected, (path, body)
        _, _, content = await raw(fleet, fleet.url, "/generate", {"inputs": "x", "lora_dir": "a"})
        assert json.loads(content)["generated_text"] == ["a"]
        _, _, content = await raw(fleet, fleet.url, "/generate_stream", {"inputs": "x", "lora_dir": "a"})
        assert b'"finished":true' in content


async def test_lora_dir_decides_which_worker_answers(
    run_worker: RunWorker, roots: list[Path], say_adapter: Script
) -> None:
    async with started(run_worker, roots, script=say_adapter, names=["m", "n"]) as fleet:
        await fleet.until_names({"m": None, "n": None, "m:a": "m", "n:a": "n", "only0": "m", "only1": "n"})
        cases: list[tuple[dict[str, Any], str, int | None]] = [
            ({"lora_dir": "only0"}, "only0", 0),
            ({"lora_dir": "only1"}, "only1", 1),
            ({"lora_dir": "a", "model": "n"}, "a", 1),
            ({"model": "n"}, "base", 1),
            ({}, "m, n", None),
            ({"lora_dir": "a"}, "m, n", None),
            ({"lora_dir": "only0", "model": "n"}, "n:only0", None),
            ({"lora_dir": "other"}, "Served: ", None),
            ({"model": "other"}, "Served: ", None),
        ]
        for fields, text, number in cases:
            for path in ("/generate", "/generate_stream"):
                before = [len(worker.engine.requests) for worker in fleet.workers]
                status, _, content = await raw(fleet, fleet.url, path, {"inputs": "x", **fields})
                asked = [len(worker.engine.requests) - had for worker, had in zip(fleet.workers, before, strict=True)]
                if number is None:
                    assert (status, asked) == (404 if "other" in fields.values() or len(fields) > 1 else 400, [0, 0])
                    assert text in json.loads(content)["error"]["message"]
                else:
                    assert (status, asked[number], sum(asked)) == (200, 1, 1), (fields, content)
                    assert path != "/generate" or json.loads(content)["generated_text"] == [text]
        assert (await raw(fleet, fleet.url, "/generate", {"inputs": "x", "lora_dir": "only0\0" * 900}))[0] == 404


async def test_an_adapter_that_is_new_in_the_root_is_found(
    run_worker: RunWorker, roots: list[Path], say_adapter: Script
) -> None:
    async with started(run_worker, roots[:1], script=say_adapter) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL, "only0": MODEL})
        body = {"lora_name": "mine", "lora_path": "a"}
        assert (await fleet.call("POST", "/v1/load_lora_adapter", body))[0] == 200
        await fleet.until_names({MODEL: None, "a": MODEL, "only0": MODEL, "mine": MODEL})
        assert (await raw(fleet, fleet.url, "/generate", {"inputs": "x", "lora_dir": "mine"}))[0] == 200


async def test_a_stream_whose_worker_is_lost_ends_with_s_loras_error(run_worker: RunWorker, roots: list[Path]) -> None:
    async with started(run_worker, roots[:1], script=lambda request, info: [300] * 500, token_s=0.02) as fleet:
        await fleet.until_names({MODEL: None, "a": MODEL, "only0": MODEL})
        body = {"inputs": "x", "parameters": {"max_new_tokens": 200}}
        async with fleet.http.post(fleet.url + "/generate_stream", json=body) as response:
            await response.content.readline()
            fleet.workers[0].engine.die()
            content = (await response.read()).decode()
        last = json.loads(content.strip().rpartition("data:")[2])
        assert (last["finished"], last["token"]["text"]) == (-1, "")
        assert last["error"]["message"]


# ---- events -----------------------------------------------------------------------------------------------------

EVENTS = [
    b'data:{"token":{"id":%d,"text":"\xe4\xb8\x96 %d","logprob":-0.5,"special":false},"generated_text":null,'
    b'"finished":%s,"details":null}\n\n' % (number, number, b"true" if number == 3 else b"false")
    for number in range(4)
]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_events_are_whole_and_end_with_the_last_token(size: int) -> None:
    sent = b"".join(EVENTS)
    stream = EventStream(10_000, 100_000, SLORA)
    passed = b""
    for start in range(0, len(sent), size):
        assert not stream.is_done
        passed += stream.feed(sent[start : start + size])
    assert passed == sent
    assert (stream.is_done, stream.has_data, stream.error) == (True, True, None)


@pytest.mark.parametrize(
    "event",
    [
        b"[DONE]",
        b"{}",
        b'{"choices":[]}',
        b'{"token":null,"finished":false}',
        b'{"token":{"id":1},"finished":false}',
        b'{"token":{"id":1,"text":"a"}}',
        b'{"token":{"id":1,"text":"a"},"finished":"no"}',
        b"[" * 5000,
        b'{"token":{"id":1,"text":"\xff"},"finished":false}',
    ],
)
def test_events_that_clients_of_s_lora_cannot_read_are_not_passed_on(event: bytes) -> None:
    with pytest.raises(InvalidAnswerError):
        EventStream(10_000, 100_000, SLORA).feed(b"data:" + event + b"\n\n")


def test_an_error_event_is_no_data() -> None:
    stream = EventStream(10_000, 100_000, SLORA)
    failure = SLORA.failure({"message": "gone"})
    assert stream.feed(failure) == failure
    assert (stream.has_data, stream.is_done, stream.error) == (False, False, failure[5:-2])
