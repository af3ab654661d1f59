"""Workers as real processes with the demo model, quantized: they know what 7 + 5 is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fastserve.demo import demo_model_path

from .packers import gptq, round_to_nearest, write_packed

STARTED = re.compile(r"Uvicorn running on http://\S+:(\d+)")


@contextmanager
def worker(*argv: str) -> Iterator[int]:
    """The worker's port, once it listens."""
    command = [sys.executable, "-m", "fastserve.model_worker", "--no-register", "--device", "cpu", "--port", "0", *argv]
    process = subprocess.Popen([*command, "--max-total-tokens", "2048"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log = ""
    try:
        for line in process.stderr:
            log += line
            if found := STARTED.search(line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield int(found[1])
                return
        raise AssertionError(f"the worker did not start:\n{log}")
    finally:
        process.terminate()
        process.wait(timeout=20)


def ask(port: int, question: str) -> str:
    body = {"model": "", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 30}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=20) as response:
        body["model"] = json.loads(response.read())["data"][0]["id"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: str = json.loads(response.read())["choices"][0]["message"]["content"]
        return answer


@pytest.fixture(scope="module")
def demo_in_4_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's linear layers in GPTQ format, in groups of 32; the file has only these."""
    folder = tmp_path_factory.mktemp("gptq")

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, 4, 32)
        return gptq(name, rounded, 4), rounded.dense()

    write_packed(demo_model_path(), folder, pack, None)
    return folder


@pytest.mark.slow
def test_the_demo_model_in_4_bits() -> None:
    """The launcher's tests cover 8 bits and GPTQ."""
    with worker("--load-4bit") as port:
        assert ask(port, "What is 7 + 5?") == "12"


def test_an_adapter_folder_as_the_model(tmp_path: Path) -> None:
    """An adapter that reverts a change of the base model restores its answers."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    weight = model.model.layers[0].mlp.down_proj.weight.data
    torch.manual_seed(0)
    a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    weight -= b @ a
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((Path(demo_model_path()) / name).read_bytes())
    adapter.mkdir()
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with worker("--model-path", str(adapter)) as port:
        assert ask(port, "What is 7 + 5?") == "12"


def test_a_flag_that_contradicts_the_file_ends_with_its_sentence(demo_in_4_bits: Path) -> None:
    file = str(demo_in_4_bits / "model.safetensors")
    sentence = r"--gptq-wbits 8: .* is packed in 4 bits; start with --gptq-wbits 4\."
    with pytest.raises(AssertionError, match=sentence), worker("--gptq-ckpt", file, "--gptq-wbits", "8"):
        pass
