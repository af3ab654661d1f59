"""The launcher with real services and engine: a quantized demo model answers what 7 + 5 is."""

from __future__ import annotations

from pathlib import Path

import openai
import psutil
import pytest
import torch

from fastserve.demo import demo_model_path
from tests.engine.packers import gptq, round_to_nearest, write_packed

from .launching import Sandbox


def write_gptq(folder: Path) -> str:
    """Write the demo model's linear layers in 4 bits to one file, without config.json."""

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, 4, 32)
        return gptq(name, rounded, 4), rounded.dense()

    write_packed(demo_model_path(), folder, pack, None, "demo-4bit-32g.safetensors")
    return str(folder / "demo-4bit-32g.safetensors")


@pytest.mark.parametrize("form", [pytest.param("8bit", marks=pytest.mark.slow), "gptq"])
def test_a_quantized_model_answers_through_the_api_server(sandbox: Sandbox, form: str) -> None:
    flags = ["--load-8bit"]
    if form == "gptq":
        file = write_gptq(sandbox.folder / "packed")
        flags = ["--gptq-ckpt", file, "--gptq-wbits", "4", "--gptq-groupsize", "32", "--gptq-act-order"]
    words = ["--model-path-address", f"fastserve-demo@localhost@{sandbox.worker_port}", "--device", "cpu"]
    result = sandbox.launch_real(*words, "--max-total-tokens", "2048", *flags, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    with openai.OpenAI(base_url=f"http://localhost:{sandbox.server_port}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="fastserve-demo", messages=[{"role": "user", "content": "What is 7 + 5?"}], temperature=0
        )
    assert answer.choices[0].message.content == "12"
    worker = psutil.Process(sandbox.services()["model_worker"])
    [engine] = [child.pid for child in worker.children() if "fastserve.engine.process" in child.cmdline()]
    settings = Path(f"/proc/{engine}/fd/0").read_text(encoding="utf-8")
    assert ('"quantize":"int8"' if form == "8bit" else '"method":"gptq"') in settings, (
        "the engine did not get the setting"
    )
    ended = sandbox.shutdown()
    assert ended.returncode == 0, ended.stderr
    assert sandbox.strays() == []
