"""A real model, from its GGUF file to answers: a worker process gives those of transformers in float32."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real_model import questions
from fastserve.gguf.file import read_gguf
from fastserve.gguf.tokenizer import make_tokenizer
from fastserve.gguf.tokens import read_vocabulary
from tests.keys import CLUSTER
from tests.processes import free_ports

from .writing import smollm2_file

MAX_TOKENS = 24
END_IDS = (0, 2)
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def reference(file: Path) -> LlamaForCausalLM:
    """The model by transformers alone. Its configuration is written out here, not read from the metadata."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    state = {}
    for tensor in read_gguf(file).tensors.values():
        type_ = gguf.GGMLQuantizationType(tensor.type_id)
        block, size = gguf.GGML_QUANT_SIZES[type_]
        data = np.fromfile(file, np.uint8, math.prod(tensor.shape) // block * size, offset=tensor.offset)
        weight = torch.from_numpy(gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], -1), type_))
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, kind = stem.split(".")
            if kind in ("attn_q", "attn_k"):
                weight = weight.reshape(-1, 32, 2, 576).transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{NAMES[kind]}.weight"] = weight
        else:
            state[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[stem] + ".weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # Buffers that no checkpoint has.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


async def ask(address: str, question: str) -> str:
    body = {
        "model": "smollm2", "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }  # fmt: skip
    async with (
        aiohttp.ClientSession(headers=CLUSTER) as http,
        http.post(f"{address}/v1/chat/completions", json=body) as answer,
    ):
        content = await answer.json()
    assert answer.status == 200, content
    return str(content["choices"][0]["message"]["content"])


async def served(folder: Path, asked: Sequence[str]) -> list[str]:
    """The answers of a worker to questions that are asked all at once."""
    port = free_ports(1)[0]
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fastserve.model_worker", "--model-path", "smollm2", "--no-register", "--device", "cpu",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--max-total-tokens", "2048",
        stderr=(folder / "log").open("wb"),
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(120), aiohttp.ClientSession(headers=CLUSTER) as http:
            while True:
                assert worker.returncode is None, (folder / "log").read_text()
                try:
                    async with http.get(f"{address}/ready") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
            return await asyncio.gather(*(ask(address, question) for question in asked))
    finally:
        if worker.returncode is None:
            worker.terminate()
        await worker.wait()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
async def test_answers_of_a_real_model_are_those_of_transformers(tmp_path: Path, count: int) -> None:
    file = smollm2_file()
    asked = questions(count)
    answers = await served(tmp_path, asked)
    header = read_gguf(file)
    tokenizer, model = make_tokenizer(header, read_vocabulary(header)), reference(file)
    for question, answer in zip(asked, answers, strict=True):
        prompt = tokenizer.encode(PROMPT.format(question)).ids
        # Looking at the whole answer at once is fast. It fails where a text has other tokens than those generated.
        if not is_greedy(model, prompt, tokenizer.encode(answer).ids):
            assert answer == tokenizer.decode(generate(model, prompt), skip_special_tokens=True)
    assert "Paris" in answers[0]


def is_greedy(model: LlamaForCausalLM, prompt: list[int], generated: list[int]) -> bool:
    """Whether each token is the best one after those before it, and the answer ends where it must."""
    with torch.inference_mode():
        found = model(torch.tensor([prompt + generated]), use_cache=False, logits_to_keep=len(generated) + 1)
    *best, following = found.logits[0].argmax(-1).tolist()
    return best == generated and (len(generated) == MAX_TOKENS or following in END_IDS)


def generate(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
            eos_token_id=list(END_IDS), pad_token_id=END_IDS[0],
        )  # fmt: skip
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer
