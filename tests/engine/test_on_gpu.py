"""The engine on a GPU, with all that only a GPU has (recorded graphs, steps that overlap, Triton's kernels): its
answers are those of transformers, and those of the engine on the CPU. `python -m pytest -m gpu`.

FASTSERVE_TEST_DEVICE=cpu runs these tests on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastserve.demo import demo_model_path
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.cuda import waiting_is_an_error
from fastserve.engine.devices.find import find_device
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.quantization import quantize_int8, quantize_nf4
from fastserve.engine.loading import loader as loading
from fastserve.engine.loading.loader import load_model
from fastserve.engine.settings import EngineConfig, WeightOptions

from .conftest import CONFIGS, TinyModels
from .packers import awq, gptq, round_to_nearest, write_packed
from .test_engine_equality import EOS, Answer, greedy, make_core, run, run_mixture
from .test_loading_end_to_end import ask, worker
from .test_speculation_equality import mixed_requests, speculating_core

DEVICE = os.environ.get("FASTSERVE_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
MIXTURES_OF_EXPERTS = ("gpt_oss", "qwen3_moe", "mixtral")
"""transformers computes their experts one after the other, or all at once where it can."""

pytestmark = pytest.mark.gpu


def make_gpu_core(path: str, **settings: Any) -> EngineCore:
    return make_core(path, **{"device": DEVICE, "max_num_seqs": 4, "max_total_tokens": 2048, **settings})


def graphs_of(core: EngineCore) -> Any:
    executor: Any = core._executor
    return next((way for way in executor.forward_passes.ways if way.name == "graphs"), None)


def answer_all(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[int]]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        assert core.add(request) is None
    run(core, answers)
    return {key: answer.token_ids for key, answer in answers.items()}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_each_architecture_equals_generate(tiny_models: TinyModels, name: str) -> None:
    path = tiny_models.path(name)
    core = make_gpu_core(path)
    if ON_CUDA:
        assert graphs_of(core) is not None or name in MIXTURES_OF_EXPERTS, "decoding steps were not recorded"
        assert core._overlap
    rng = random.Random(1)
    prompts = {f"r{length}": [rng.randrange(2, 160) for _ in range(length)] for length in (1, 3, 17, 60)}
    answers = answer_all(core, [greedy(prompt, 30, key) for key, prompt in prompts.items()])
    for key, prompt in prompts.items():
        assert answers[key] == tiny_models.reference(path, prompt, 30, [EOS])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "demo"])
def test_random_mixtures_equal_generate(tiny_models: TinyModels, name: str) -> None:
    """Chunked prefill, prefix hits, preemption and aborts, with steps that overlap."""
    path = demo_model_path() if name == "demo" else tiny_models.path(name)
    assert run_mixture(tiny_models, path, 4, 0, device=DEVICE, max_num_seqs=16) > 0


@pytest.mark.parametrize("kind", ["ngram", "random", "same model"])
def test_speculation_changes_no_answer(tiny_models: TinyModels, kind: str) -> None:
    requests = mixed_requests(random.Random(5), 24)
    plain = make_core(tiny_models.path("llama"), speculative_method="off")
    core = speculating_core(
        tiny_models, "llama", kind,
        device=DEVICE, block_size=4, max_num_seqs=16,
        max_num_batched_tokens=21, max_total_tokens=112, max_model_len=100,
    )  # fmt: skip
    assert answer_all(core, requests) == answer_all(plain, requests)
    assert core.stats.draft_tokens > 20
    assert core.scheduler.preemptions > 0
    assert core.scheduler.cached_tokens > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_dtypes_give_right_answers(dtype: str) -> None:
    assert ask_demo(dtype=dtype)[0] == RIGHT


# ---- weights of fewer bits --------------------------------------------------------------------------------------

RIGHT = {"What is 7 + 5?": "12", "Which port does the controller use?": "The controller listens on port 21001."}


def ask_demo(**settings: Any) -> tuple[dict[str, str], EngineCore]:
    """The demo model's answers to the questions of RIGHT, and its core."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    core = make_gpu_core(demo_model_path(), **{"speculative_method": "off", **settings})
    requests = []
    for question in RIGHT:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        requests.append(greedy(prompt, 20, question, core.info.eos_token_ids))
    found = answer_all(core, requests)
    return {key: tokenizer.decode(ids, skip_special_tokens=True).strip() for key, ids in found.items()}, core


def count_kernel_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each product of a quantized weight that a kernel for GPUs computes."""
    products: list[int] = []
    original = QuantizedWeight._product_of_codes

    def counted(self: QuantizedWeight, x: torch.Tensor) -> torch.Tensor | None:
        found = original(self, x)
        if found is not None:
            products.append(len(x))
        return found

    monkeypatch.setattr(QuantizedWeight, "_product_of_codes", counted)
    return products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_quantized_by_ourselves(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str) -> None:
    quantize = {"int8": quantize_int8, "nf4": quantize_nf4}[kind]
    monkeypatch.setattr(loading, "find_quantizer", lambda _: quantize)
    products = count_kernel_products(monkeypatch)
    answers, core = ask_demo(dtype=dtype, weights=WeightOptions(quantize=kind))
    assert answers == RIGHT
    if ON_CUDA:
        assert products
        assert graphs_of(core) is not None


def test_weights_quantized_by_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    assert ask_demo(dtype="bfloat16", weights=WeightOptions(quantize="nf4"))[0] == RIGHT


@pytest.mark.parametrize("method", ["gptq", "gptq, act order", "awq"])
def test_packed_checkpoints_equal_what_they_stand_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """Greedy tokens are those of transformers with the dequantized weights."""

    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, 4, 32, shuffled="order" in method)
        return awq(name, rounded) if method == "awq" else gptq(name, rounded, 4), rounded.dense()

    settings: dict[str, Any] = {"quant_method": method.partition(",")[0], "bits": 4, "group_size": 32}
    settings |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": "order" in method}
    dense = write_packed(demo_model_path(), tmp_path / "packed", pack, settings)
    dense.save_pretrained(tmp_path / "dense")
    products = count_kernel_products(monkeypatch)
    core = make_gpu_core(str(tmp_path / "packed"))
    prompts = {f"r{length}": list(range(5, 5 + length)) for length in (3, 30, 100)}
    answers = answer_all(core, [greedy(prompt, 20, key, ()) for key, prompt in prompts.items()])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    for key, prompt in prompts.items():
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=1,
        )
        assert answers[key] == expected[0, len(prompt) :].tolist()
    if ON_CUDA:
        assert products


# ---- what the device has to do with it --------------------------------------------------------------------------


def test_sampled_answers_are_those_of_the_cpu(tiny_models: TinyModels) -> None:
    requests = mixed_requests(random.Random(9), 32)
    path = tiny_models.path("qwen3")
    on_gpu = answer_all(make_gpu_core(path, max_num_seqs=16), requests)
    assert on_gpu == answer_all(make_core(path), requests)


def test_a_step_is_launched_without_waiting_for_the_device(tiny_models: TinyModels) -> None:
    """Prompts, single tokens, and tokens sampled with every logits processor."""
    if not ON_CUDA:
        pytest.skip("CUDA reports what waits")
    core = make_gpu_core(tiny_models.path("llama"), max_num_seqs=8, speculative_method="off")
    executor: Any = core._executor
    answer_all(core, mixed_requests(random.Random(3), 8))  # compiles kernels, which may wait
    launch = executor.launch

    def watched(plan: Any) -> Any:
        with waiting_is_an_error():
            return launch(plan)

    executor.launch = watched
    answers = answer_all(core, mixed_requests(random.Random(4), 8))
    assert all(answers.values())


def test_what_cannot_be_recorded_runs_one_kernel_at_a_time(
    tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """A model whose code reads values on the device is served all the same, and a line says that it is slower."""
    if not ON_CUDA:
        pytest.skip("nothing is recorded on a CPU")
    path = tiny_models.path("llama")

    def look_at_values(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output if bool(output.isfinite().all()) else output * 0

    original = loading._finish_model

    def take_over(model: Any, *args: Any) -> Any:
        model.get_input_embeddings().register_forward_hook(look_at_values)
        return original(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_finish_model", lambda model, *args, **named: take_over(model, *args, *named.values()))
        core = make_gpu_core(path)
    assert graphs_of(core) is None
    assert "Decoding without CUDA graphs" in caplog.text
    prompt = list(range(3, 30))
    assert answer_all(core, [greedy(prompt, 16)])["r"] == tiny_models.reference(path, prompt, 16, [EOS])


def test_the_kv_cache_of_all_layers_counts_towards_the_memory_of_the_device(tiny_models: TinyModels) -> None:
    loaded = load_model(tiny_models.path("llama"), DEVICE, "float32", trust_remote_code=False, progress=lambda *_: None)
    assert find_device(DEVICE).torch_device == loaded.device == next(loaded.model.parameters()).device
    assert len(loaded.attention.shapes_on(loaded.device)) == CONFIGS["llama"].num_hidden_layers
    core = build_core(
        EngineConfig(model_dir=tiny_models.path("llama"), device=DEVICE, max_num_seqs=4, gpu_memory_utilization=0.9),
        lambda *_: None,
    )
    assert core.info.num_blocks == 4 * 256 // 16, "no more than all sequences at their longest"


def test_a_worker_answers() -> None:
    with worker("--device", DEVICE) as port:
        for question, answer in RIGHT.items():
            assert ask(port, question) == answer


def test_a_sequence_as_long_as_its_context(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Positions up to the last, over many splits and blocks."""
    config = {
        **json.loads((Path(tiny_models.path("llama")) / "config.json").read_text()),
        "max_position_embeddings": 3000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((Path(tiny_models.path("llama")) / "model.safetensors").read_bytes())
    core = make_gpu_core(str(tmp_path), max_total_tokens=8192, max_num_batched_tokens=700)
    rng = random.Random(2)
    prompt = [rng.randrange(2, 160) for _ in range(2980)]
    request = EngineRequest("r", prompt, SamplingParams(20, temperature=0.0))
    assert answer_all(core, [request])["r"] == tiny_models.reference(str(tmp_path), prompt, 20, [])
