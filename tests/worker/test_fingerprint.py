"""`system_fingerprint`: the same wherever the same files compute an answer, else another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.contract import EngineStats
from fastserve.worker.fingerprint import NUM_SAMPLES, SAMPLE_BYTES, files_digest
from tests.worker.conftest import MODEL, Running, RunWorker
from tests.worker.test_adapters import load, make_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        make_adapter(tmp_path / "root" / name)
        (tmp_path / "root" / name / "adapter_model.safetensors").write_text(name)
    return tmp_path / "root"


async def fingerprint(running: Running, model: str) -> str:
    """The one of whole answers and of every chunk of streams, of both routes."""
    found = set()
    for path, fields in (
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("completions", {"prompt": "Hi"}),
    ):
        body: dict[str, Any] = {"model": model, "max_tokens": 4, **fields}
        status, answer = await running.post(f"/v1/{path}", body)
        assert status == 200, answer
        found.add(answer["system_fingerprint"])
        async with running.http.post(f"{running.url}/v1/{path}", json=body | {"stream": True}) as response:
            lines = (await response.read()).decode().split("\n\n")
        found |= {json.loads(line[6:])["system_fingerprint"] for line in lines if line.startswith("data: {")}
    (one,) = found
    assert one.startswith("fp_")
    return str(one)


async def test_it_is_the_same_for_the_same_files_and_differs_for_adapters_and_weights(
    run_worker: RunWorker, root: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (MODEL, "one", "two")
    async with run_worker(lora_root=str(root)) as running:
        first = [await fingerprint(running, name) for name in names]
        assert len(set(first)) == len(first)
        assert await fingerprint(running, f"{MODEL}:one") == first[1]
        await load(running, "mine", "one")
        before = await fingerprint(running, "mine")
        (root / "one" / "adapter_model.safetensors").write_text("new")
        assert await fingerprint(running, "mine") == before, "these weights are still the old ones"
        await load(running, "mine", "one", load_inplace=True)
        assert await fingerprint(running, "mine") != before
        (root / "one" / "adapter_model.safetensors").write_text("one")
        monkeypatch.setattr(type(running.engine), "stats", EngineStats(weight_version="2"))
        assert not {await fingerprint(running, name) for name in names} & set(first)
        monkeypatch.undo()
    copied = shutil.copytree(model_dir, tmp_path / "copy")
    other = shutil.copytree(root, tmp_path / "other")
    async with run_worker(lora_root=str(other), folder=copied) as running:
        assert [await fingerprint(running, name) for name in names] == first, "the same files in other folders"
    async with run_worker(lora_root=str(other), folder=copied, load_8bit=True) as running:
        assert await fingerprint(running, MODEL) != first[0]
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 1 for byte in content[len(content) // 2 :])
    weights.write_bytes(content)
    async with run_worker(lora_root=str(other), folder=copied) as running:
        assert not {await fingerprint(running, name) for name in names} & set(first)


def test_samples_of_a_large_file_reach_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    size = 4 * NUM_SAMPLES * SAMPLE_BYTES
    content = bytearray(size)
    file = tmp_path / "model.safetensors"

    def digest() -> str:
        file.write_bytes(content)
        return files_digest([tmp_path])

    found = {digest()}
    for part in range(8):
        content = bytearray(size)
        content[part * size // 8 : (part + 1) * size // 8] = b"\1" * (size // 8)
        found.add(digest())
    content = bytearray(size + 1)
    found.add(digest())
    assert len(found) == 10


def test_files_that_are_missing_or_no_weights_do_no_harm(tmp_path: Path) -> None:
    before = files_digest([tmp_path])
    (tmp_path / "README.md").write_text("words")
    assert files_digest([tmp_path]) == before
    (tmp_path / "model.bin").symlink_to(tmp_path / "none")
    assert files_digest([tmp_path, tmp_path / "gone"]) != before
