"""A worker process with a real engine, and a trainer process that knows torch.distributed and HTTP alone."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.demo import demo_model_path
from tests.engine.weight_updates.trainer_process import Trainer, free_port
from tests.worker.conftest import until
from tests.worker.test_model_worker_process import Process

QUESTION = {"model": "m", "prompt": "What is 7 + 5?", "max_tokens": 12, "temperature": 0}


@pytest.mark.slow
async def test_a_trainer_updates_a_serving_worker_and_joins_again_after_it_died(tmp_path: Path) -> None:
    demo = Path(demo_model_path())
    tensors = load_file(demo / "model.safetensors")
    torch.manual_seed(3)
    save_file(
        {name: (weight + 0.05 * torch.randn(weight.shape)).to(weight.dtype) for name, weight in tensors.items()},
        tmp_path / "model.safetensors",
    )
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    process = Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastserve.model_worker", "--model-path", str(demo), "--model-names", "m",
            "--no-register", "--port", "0", "--device", "cpu", "--dtype", dtype, "--max-total-tokens", "2048",
            env=dict(os.environ), stderr=asyncio.subprocess.PIPE,
        )
    )  # fmt: skip
    reading = asyncio.create_task(process.read())
    trainer = Trainer()
    try:
        await until(lambda: process.address, 60)
        async with aiohttp.ClientSession() as http:

            async def post(path: str, body: Any) -> tuple[int, Any]:
                async with http.post(process.address + path, json=body) as response:
                    return response.status, await response.json()

            async def is_ready() -> bool:
                async with http.get(process.address + "/ready") as response:
                    return response.status == 200

            async with asyncio.timeout(60):
                while not await is_ready():  # noqa: ASYNC110  it has no event for this
                    await asyncio.sleep(0.1)
            _, before = await post("/v1/completions", QUESTION)
            _, checked = await post("/weights_checker", {"action": "checksum"})
            announced = {
                "names": list(tensors),
                "dtypes": [str(weight.dtype) for weight in tensors.values()],
                "shapes": [list(weight.shape) for weight in tensors.values()],
                "group_name": "g",
            }

            async def join() -> None:
                port = free_port()
                trainer.begin("join", port=port, rank=0, world_size=2, name="g")
                group = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
                status, answer = await post(
                    "/init_weights_update_group", group | {"group_name": "g", "backend": "gloo"}
                )
                assert (status, answer["success"]) == (200, True)
                trainer.answer()

            async def send(folder: Path, version: str) -> None:
                trainer.begin("broadcast", folder=str(folder), names=list(tensors), name="g")
                status, answer = await post("/update_weights_from_distributed", announced | {"weight_version": version})
                assert (status, answer["success"], answer["tensors"]) == (200, True, len(tensors)), answer
                trainer.answer()

            await join()
            asking = [asyncio.create_task(post("/v1/completions", QUESTION | {"max_tokens": 60})) for _ in range(4)]
            await send(tmp_path, "step 1")
            assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 4
            async with http.get(process.address + "/get_model_info") as response:
                assert (await response.json())["weight_version"] == "step 1"
            _, changed = await post("/weights_checker", {"action": "checksum"})
            assert changed["checksum"] != checked["checksum"]
            async with http.get(
                process.address + "/get_weights_by_parameter_name?name=model.norm.weight&truncate_size=10"
            ) as response:
                stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
                assert await response.json() == stored[:10].float().tolist()
            # It dies halfway; the worker keeps its weights, serves on, and is joined by another one.
            trainer.begin("broadcast", folder=str(demo), names=list(tensors), name="g", only=len(tensors) // 2)
            updating = asyncio.create_task(post("/update_weights_from_distributed", announced))
            await asyncio.to_thread(trainer.answer)
            trainer.end()
            status, answer = await updating
            assert (status, answer["success"], answer["error"]["code"]) == (502, False, "weight_transfer_failed")
            assert (await post("/v1/completions", QUESTION))[0] == 200
            assert (await post("/weights_checker", {"action": "checksum"}))[1]["checksum"] == changed["checksum"]
            trainer = Trainer()
            await join()
            await send(demo, "step 2")
            assert (await post("/weights_checker", {"action": "checksum"}))[1]["checksum"] == checked["checksum"]
            _, after = await post("/v1/completions", QUESTION)
            assert json.dumps(after["choices"]) == json.dumps(before["choices"])
    finally:
        trainer.end()
        process.process.terminate()
        await process.ended()
        await reading
