"""Routes that replace weights, on the fake engine: names, bodies, statuses, and what clients see of a version."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fastserve.engine.fake import FakeOptions, noise
from tests.worker.conftest import MODEL, Running, RunWorker, until

LONG: dict[str, Any] = {"model": MODEL, "prompt": "one", "max_tokens": 150}
GROUP: dict[str, Any] = {
    "master_address": "127.0.0.1",
    "master_port": 29600,
    "rank_offset": 1,
    "world_size": 2,
    "backend": "gloo",
}
TENSORS: dict[str, Any] = {"names": ["a"], "dtypes": ["torch.bfloat16"], "shapes": [[2, 3]]}
ADMIN_ROUTES = (
    "/init_weights_update_group",
    "/init_parameter_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/update_parameter_from_distributed",
    "/update_weights_from_tensor",
    "/update_weights_from_disk",
    "/get_weights_by_name",
    "/get_weights_by_parameter_name",
    "/weights_checker",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weight_version",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
)


async def get(running: Running, path: str) -> tuple[int, Any]:
    async with running.http.get(running.url + path) as response:
        return response.status, await response.json()


@pytest.fixture
async def worker(run_worker: RunWorker) -> Any:
    def prepare(options: FakeOptions) -> None:
        options.transfer_s = 0.02

    async with run_worker(noise, token_s=0.005, prepare=prepare) as running:
        yield running


@pytest.mark.parametrize("name", ["init_weights_update_group", "init_parameter_update_group"])
async def test_a_trainer_joins_sends_and_leaves(worker: Running, name: str) -> None:
    assert (await worker.post("/update_weights_from_distributed", TENSORS))[0] == 404
    status, answer = await worker.post(f"/{name}", GROUP)
    assert (status, answer["success"]) == (200, True)
    status, answer = await worker.post(f"/{name}", GROUP)
    assert (status, answer["success"], answer["error"]["param"]) == (409, False, "group_name")
    status, answer = await worker.post("/update_weights_from_distributed", TENSORS | {"weight_version": "step 7"})
    assert (status, answer["success"], answer["weight_version"]) == (200, True, "step 7")
    assert {"message", "bytes", "tensors", "buckets", "setup_s", "first_s", "transfer_s", "load_s", "flush_s"} < set(
        answer
    )
    assert "gb_per_s" in answer
    one = {"name": "a", "dtype": "bfloat16", "shape": [2, 3], "empty_cache": True}
    assert (await worker.post("/update_parameter_from_distributed", one))[1]["weight_version"] == "2"
    assert (await worker.post("/destroy_weights_update_group", {}))[0] == 200
    assert (await worker.post("/destroy_weights_update_group", {}))[0] == 404


async def test_the_version_is_shown_everywhere(worker: Running) -> None:
    assert (await get(worker, "/get_weight_version"))[1] == {"weight_version": "default"}
    assert (await worker.post("/update_weights_from_disk", {"model_path": "/x", "weight_version": "v\n2"}))[0] == 200
    for path in ("/get_weight_version", "/get_model_info", "/model_info"):
        assert (await get(worker, path))[1]["weight_version"] == "v\n2"
    [card] = (await get(worker, "/v1/models"))[1]["data"]
    assert card["weight_version"] == "v\n2"
    async with worker.http.get(worker.url + "/metrics") as response:
        text = await response.text()
    assert 'fastserve_engine_weight_version{version="v\\n2"} 1.0' in text
    assert "fastserve_engine_weight_updates_total 1.0" in text
    assert (await worker.post("/update_weight_version", {"new_version": "v3"}))[1]["weight_version"] == "v3"


async def test_safetensors_bytes_come_as_the_body_or_in_base64_and_pickles_do_not(worker: Running) -> None:
    data = save({"a": torch.ones(2)})
    path = "/update_weights_from_tensor"
    status, answer = await worker.post(path, {"serialized_named_tensors": base64.b64encode(data).decode()})
    assert (status, answer["weight_version"]) == (200, "1")
    async with worker.http.post(
        f"{worker.url}{path}?weight_version=raw&mode=abort",
        data=data,
        headers={"content-type": "application/octet-stream"},
    ) as response:
        assert (response.status, (await response.json())["weight_version"]) == (200, "raw")
    for pickled in (b"\x80\x04.", b"PK\x03\x04..."):
        status, answer = await worker.post(path, {"serialized_named_tensors": base64.b64encode(pickled).decode()})
        assert (status, answer["success"]) == (400, False)
        assert "pickled" in answer["error"]["message"]
    assert (await worker.post(path, {"serialized_named_tensors": "no base64!"}))[0] == 400


async def test_one_update_runs_at_a_time_and_both_callers_are_answered(worker: Running) -> None:
    answers = await asyncio.gather(
        *(worker.post("/update_weights_from_disk", {"model_path": f"/{i}"}) for i in range(3))
    )
    assert sorted(status for status, _ in answers) == [200, 409, 409]


async def test_an_update_waits_for_running_requests_or_ends_them(worker: Running) -> None:
    for body, expected in (({}, 200), ({"abort_all_requests": True}, 503), ({"mode": "retract"}, 200)):
        runs = asyncio.create_task(worker.post("/v1/completions", LONG))
        await until(lambda: worker.engine.stats.num_running == 1)
        status, answer = await worker.post("/update_weights_from_disk", {"model_path": "/x"} | body)
        assert status == 200
        assert answer["num_aborted"] == (expected == 503)
        assert worker.engine.stats.num_running == (body == {"mode": "retract"})
        assert (await runs)[0] == expected
        await worker.idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_answer_of_two_versions_says_so(worker: Running, path: str) -> None:
    prompt: dict[str, Any] = {"prompt": "one"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "one"}]}
    body = {"model": MODEL, "max_tokens": 150, **prompt}

    async def choice(stream: bool, mode: str) -> dict[str, Any]:
        asked = asyncio.create_task(ask(stream))
        await until(lambda: worker.engine.stats.num_running == 1 and worker.engine.stats.generated_tokens)
        await asyncio.sleep(0.02)
        old = worker.engine.stats.weight_version
        _, answer = await worker.post("/update_weights_from_disk", {"model_path": "/x", "mode": mode})
        found = await asked
        await worker.idle()
        expected = {"weight_versions": [old, answer["weight_version"]]} if mode == "retract" else {}
        assert {name: value for name, value in found.items() if name == "weight_versions"} == expected
        return found

    async def ask(stream: bool) -> dict[str, Any]:
        async with worker.http.post(worker.url + path, json=body | {"stream": stream}) as response:
            text = await response.text()
        if not stream:
            return dict(json.loads(text)["choices"][0])
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return dict(chunks[-1]["choices"][0])

    for stream in (False, True):
        for mode in ("retract", "drain"):
            assert (await choice(stream, mode))["finish_reason"] == "length"


async def test_generation_is_paused_and_continued_as_sglang_does(worker: Running) -> None:
    for mode in ("in_place", "retract"):
        runs = asyncio.create_task(worker.post("/v1/completions", LONG))
        await until(lambda: worker.engine.stats.num_running == 1)
        assert (await worker.post("/pause_generation", {"mode": mode}))[1]["paused"]
        assert (await worker.post("/update_weights_from_disk", {"model_path": "/x"}))[0] == 200, "at once"
        assert not runs.done()
        assert (await get(worker, "/flush_cache"))[0] == 200
        assert (await worker.post("/continue_generation", {}))[0] == 200
        assert (await runs)[0] == 200
    runs = asyncio.create_task(worker.post("/v1/completions", LONG))
    await until(lambda: worker.engine.stats.num_running == 1)
    assert (await worker.post("/pause_generation", {}))[1]["num_aborted"] == 1
    assert (await runs)[1]["error"]["code"] == "request_aborted"


async def test_vllms_calls_are_one_update_of_several_transfers(worker: Running) -> None:
    assert (await get(worker, "/get_world_size"))[1] == {"world_size": 1}
    info = {"master_address": "127.0.0.1", "master_port": 29600, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    assert (await worker.post("/init_weight_transfer_engine", {"init_info": info}))[0] == 200
    part = {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2]], "packed": True}
    assert (await worker.post("/update_weights", {"update_info": part}))[0] == 409
    assert (await worker.post("/start_weight_update", {"weight_version": "v9"}))[0] == 200
    for _ in range(2):
        assert (await worker.post("/update_weights", {"update_info": part}))[1]["weight_version"] == "default"
    status, answer = await worker.post("/finish_weight_update", {})
    assert (status, answer["weight_version"], answer["tensors"]) == (200, "v9", 2)
    assert (await worker.post("/start_weight_update", {"is_checkpoint_format": False}))[0] == 400


async def test_weights_are_read_and_checked(worker: Running) -> None:
    for path in ("/get_weights_by_name", "/get_weights_by_parameter_name"):
        assert await get(worker, f"{path}?name=a&truncate_size=1") == (200, [0.5])
        rows: Any = await worker.post(path, {"name": "a"})
        assert rows == (200, [0.5, 1.5])
        assert (await get(worker, f"{path}?name=bad"))[0] == 404
        assert (await get(worker, f"{path}?name=a&truncate_size=0"))[0] == 400
        assert (await get(worker, f"{path}?nome=a"))[0] == 400
    for action in ("checksum", "snapshot", "reset_tensors", "compare"):
        status, answer = await worker.post("/weights_checker", {"action": action})
        assert (status, answer["success"]) == (200, True)
        assert (len(answer["checksum"]) == 64) == (action == "checksum")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/init_weights_update_group", GROUP | {"rank_offset": 2}, "rank_offset"),
        ("/init_weights_update_group", GROUP | {"master_port": 0}, "master_port"),
        ("/init_weights_update_group", GROUP | {"world_size": 1}, "world_size"),
        ("/init_weights_update_group", GROUP | {"backend": "mpi"}, "backend"),
        ("/init_weights_update_group", {"master_port": 1}, "master_address"),
        ("/update_weights_from_distributed", TENSORS | {"shapes": []}, "shapes"),
        ("/update_weights_from_distributed", TENSORS | {"dtypes": ["a", "b"]}, "dtypes"),
        ("/update_weights_from_distributed", TENSORS | {"shapes": [[-1]]}, "shapes.0.0"),
        ("/update_weights_from_distributed", TENSORS | {"load_format": "direct"}, "load_format"),
        ("/update_weights_from_distributed", TENSORS | {"mode": "now"}, "mode"),
        ("/update_weights_from_disk", {"model_path": ""}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/x/bad"}, "names"),
        ("/update_weights_from_disk", {"model_path": "/x", "is_async": True}, "is_async"),
        ("/weights_checker", {"action": "guess"}, "action"),
        ("/update_weight_version", {"new_version": ""}, "new_version"),
    ],
)
async def test_what_is_wrong_with_a_body_is_named(worker: Running, path: str, body: Any, field: str) -> None:
    status, answer = await worker.post(path, body)
    assert (status, answer["success"], answer["error"]["param"]) == (400, False, field)
    assert answer["message"]


async def test_only_administrators_change_weights(run_worker: RunWorker, tmp_path: Path) -> None:
    key_file = tmp_path / "admin.key"
    key_file.write_text("an-admin-key-of-these-tests\n")
    key_file.chmod(0o600)
    async with run_worker(admin_key_file=str(key_file), api_keys=("sk-client",)) as running:
        for path in ADMIN_ROUTES:
            status, answer = await running.post(path, {}, Authorization="Bearer sk-client")
            assert (status, answer["error"]["code"]) == (403, "permission_denied")


async def test_a_worker_with_half_an_update_leaves_dispatch(worker: Running) -> None:
    worker.engine._updates.problem = "A weight update failed halfway."
    assert not worker.runtime.status().ready
    assert (await get(worker, "/ready"))[0] == 503
    status, answer = await worker.post("/v1/completions", LONG)
    assert (status, answer["error"]["code"]) == (503, "weights_incomplete")
    assert (await worker.post("/update_weights_from_disk", {"model_path": "/x"}))[0] == 200
    assert worker.runtime.status().ready
    assert (await get(worker, "/ready"))[0] == 200
