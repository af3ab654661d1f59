"""Models divided over ranks compute what the whole model does, and give their whole weights by name.

The ranks are threads here; how processes exchange tensors is tested elsewhere.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    CohereConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    Glm4Config,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from fastserve.engine.build import build_core
from fastserve.engine.contract import SamplingParams, TokenLogprob
from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.layers.parallel import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from fastserve.engine.loading import checkpoint, partition_plan
from fastserve.engine.loading.formats.source import QuantizedTensor
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.loading.sharding import Shard
from fastserve.engine.loading.tensor_shards import take
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives, RankLostError
from fastserve.engine.ranks.thread_collectives import run_ranks
from fastserve.engine.settings import EngineConfig, PackedCheckpoint, WeightOptions
from fastserve.errors import StartupError
from fastserve.worker.model_source import find_model
from tests.gguf.writing import smollm2_file

from .conftest import CONFIGS, SHAPE, TinyModels, logits_of
from .packers import Pack, awq, gptq, round_to_nearest, write_packed
from .test_architectures import requests_for, run
from .test_formats import (
    SIZES,
    compressed,
    gptq_packer,
    pack_fp8,
    pack_fp8_blocks,
    pack_int8,
    pack_w4a16,
    pack_w8a16_in_order,
    write_gguf,
)
from .test_loading import write_adapter

MORE_CONFIGS: dict[str, PretrainedConfig] = {
    "odd vocabulary, all biases": LlamaConfig(**{**SHAPE, "vocab_size": 157}, attention_bias=True, mlp_bias=True),
    "uneven heads": LlamaConfig(**{**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3}, head_dim=8),
    "one KV head, uneven MLP": Qwen3Config(**{**SHAPE, "num_key_value_heads": 1, "intermediate_size": 90}, head_dim=16),
    "parallel blocks": CohereConfig(**SHAPE, use_qk_norm=True),
    "fused gate and up": Glm4Config(**SHAPE, head_dim=12),
    "latent attention": DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=24, qk_rope_head_dim=8, v_head_dim=12,
        qk_nope_head_dim=10, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1,
    ),
}  # fmt: skip
PARAMS = SamplingParams(16, temperature=0.0, logprobs=150)
COMPUTED = ("llama", "gpt_oss", "olmo2", "one KV head, uneven MLP")
"""Models whose answers are compared in the default run; of the others, logits are."""
TOKENS = torch.randint(2, 150, (17,), generator=torch.Generator().manual_seed(0)).tolist()


def load(
    path: str | Path,
    collectives: Collectives = SINGLE_RANK,
    dtype: str = "float32",
    *,
    expert_parallel: bool = False,
    **options: Any,
) -> LoadedModel:
    return load_model(
        str(path), "cpu", dtype, trust_remote_code=False, progress=lambda *_: None, options=WeightOptions(**options),
        collectives=collectives, expert_parallel=expert_parallel,
    )  # fmt: skip


def start_and_run(path: str, collectives: Collectives = SINGLE_RANK, **settings: Any) -> dict[str, list[TokenLogprob]]:
    """Logprobs of greedy answers, of short and long prompts in one batch, with chunked prefill and prefix hits."""
    config = EngineConfig(
        model_dir=path, device="cpu", dtype="float32", max_num_seqs=16, max_num_batched_tokens=48,
        max_total_tokens=512, max_model_len=96, speculative_method="off", **settings,
    )  # fmt: skip
    core = build_core(config, lambda *_: None, collectives=collectives)
    requests = requests_for(random.Random(7), 40)[:5]
    return run(core, [msgspec.structs.replace(request, params=PARAMS) for request in requests])


def assert_equal_answers(found: dict[str, list[TokenLogprob]], expected: dict[str, list[TokenLogprob]]) -> None:
    for name, answer in expected.items():
        assert [token.token_id for token in found[name]] == [token.token_id for token in answer]
        for ours, theirs in zip(found[name], answer, strict=True):
            whole = dict(theirs.top)
            assert all(abs(logprob - whole[token_id]) < 1e-4 for token_id, logprob in ours.top if token_id in whole)


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The path of a tiny model by its name in CONFIGS or MORE_CONFIGS."""
    return paths_of(MORE_CONFIGS, tiny_models, tmp_path_factory.mktemp("divided"))


def paths_of(configs: Mapping[str, PretrainedConfig], tiny_models: TinyModels, folder: Path) -> Callable[[str], str]:
    """The path of a tiny model by its name in CONFIGS or `configs`, which is saved in `folder` when it is asked for."""

    def path_of(name: str) -> str:
        if name in CONFIGS:
            return tiny_models.path(name)
        path = folder / name.replace(" ", "-")
        if not path.exists():
            save(configs[name], path)
        return str(path)

    return path_of


def two_sets_of_weights(path: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's own weights by name, and random ones of the same shapes."""
    own = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    generator = torch.Generator().manual_seed(1)
    return own, {name: torch.randn(value.shape, generator=generator) for name, value in own.items()}


def assert_round_trip(
    loaded: LoadedModel, expected: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]
) -> None:
    """A rank of a divided model gives the whole weights `expected`, and `fresh` ones after they are set."""
    weights = loaded.weights
    assert len(weights.names()) >= len(expected)
    assert weights.num_parameters == sum(value.numel() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(weights.get(name), value), name
    for name, value in fresh.items():
        weights.set(name, value)
        assert torch.equal(weights.get(name), value), name


def save(config: PretrainedConfig, folder: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases of zeros and norms of ones would hide that a part is missing
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)


# ---- equality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) for name in COMPUTED]
    + [
        pytest.param(name, size, marks=pytest.mark.slow)
        for name in (*CONFIGS, *MORE_CONFIGS)
        for size in (2, 4)
        if size == 4 or name not in COMPUTED
    ],
)
def test_answers_of_ranks_equal_those_of_one(models: Callable[[str], str], name: str, size: int) -> None:
    path = models(name)
    expected = start_and_run(path)
    found = run_ranks(size, lambda collectives: start_and_run(path, collectives))
    assert all(answers == found[0] for answers in found)  # bit for bit
    assert_equal_answers(found[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_answers_of_a_real_model_equal_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """9 heads and 3 KV heads, some of which several of 4 ranks share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = find_model(str(smollm2_file()), "main")
    weights = WeightOptions(gguf_file=str(source.gguf_file))
    expected = start_and_run(str(source.folder), weights=weights)
    found = run_ranks(size, lambda collectives: start_and_run(str(source.folder), collectives, weights=weights))
    assert all(answers == found[0] for answers in found)
    assert_equal_answers(found[0], expected)


@pytest.mark.slow
def test_a_real_model_of_which_the_ranks_have_uneven_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 heads and 3 KV heads over 2 ranks: one has 3 heads, the other 6."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = find_model(str(smollm2_file()), "main")
    options: dict[str, Any] = {"gguf_file": str(source.gguf_file)}
    expected = logits_of(load(source.folder, **options), TOKENS)

    def run_rank(collectives: Collectives) -> tuple[torch.Tensor, int]:
        loaded = load(source.folder, collectives, **options)
        return logits_of(loaded, TOKENS), loaded.attention.shapes[0].num_heads

    found = run_ranks(2, run_rank)
    assert sorted(heads for _, heads in found) == [3, 6]
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][0] - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- weights by name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) for name in (*CONFIGS, *MORE_CONFIGS)]
    + [(name, 4) for name in (*COMPUTED, *MORE_CONFIGS) if name != COMPUTED[-1]]
    + [pytest.param(name, 4, marks=pytest.mark.slow) for name in CONFIGS if name not in COMPUTED],
)
def test_logits_equal_those_of_one_and_whole_weights_round_trip(
    models: Callable[[str], str], name: str, size: int
) -> None:
    path = models(name)
    logits = logits_of(load(path), TOKENS)
    expected, fresh = two_sets_of_weights(path)

    def run_rank(collectives: Collectives) -> torch.Tensor:
        loaded = load(path, collectives)
        found = logits_of(loaded, TOKENS)
        assert_round_trip(loaded, expected, fresh)
        with pytest.raises(ValueError, match="has the shape"):
            loaded.weights.set(next(iter(expected)), torch.zeros(1, 2, 3))
        return found

    found = run_ranks(size, run_rank)
    assert all(torch.equal(each, found[0]) for each in found)  # bit for bit
    assert (found[0] - logits).abs().max() < 1e-5 * logits.abs().max()


def test_weights_set_on_all_ranks_are_those_that_compute(models: Callable[[str], str], tmp_path: Path) -> None:
    save(MORE_CONFIGS["odd vocabulary, all biases"], tmp_path)
    other = load_file(tmp_path / "model.safetensors")
    expected = logits_of(load(tmp_path), TOKENS)
    path = models("odd vocabulary, all biases")

    def run_rank(collectives: Collectives) -> torch.Tensor:
        loaded = load(path, collectives)
        for name, value in other.items():
            loaded.weights.set(name, value)
        return logits_of(loaded, TOKENS)

    for logits in run_ranks(2, run_rank):
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def stored_numbers(loaded: LoadedModel) -> int:
    """Numbers in all layouts and parameters that the rank holds; tied weights once."""
    layouts = {id(module.layout): module.layout for module in loaded.model.modules() if isinstance(module, Linear)}
    inside = [layout for module in loaded.model.modules() if isinstance(module, Experts)
              for each in module.layouts.values() for layout in each]  # fmt: skip
    in_layouts: int = sum(layout.get().numel() for layout in (*layouts.values(), *inside))
    in_parameters: int = sum(parameter.numel() for parameter in loaded.model.parameters())
    return in_layouts + in_parameters


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_a_rank_holds_its_share(models: Callable[[str], str], name: str) -> None:
    path = models(name)
    whole = stored_numbers(load(path))
    for found in run_ranks(2, lambda collectives: stored_numbers(load(path, collectives))):
        assert 0.45 * whole < found <= 0.58 * whole


# ---- formats ----------------------------------------------------------------------------------------------------


def pack_awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rounded = round_to_nearest(weight, 4, 32)
    return awq(name, rounded), rounded.dense()


FORMATS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4}),
    "gptq of one group": (gptq_packer(8, -1), {"quant_method": "gptq", "bits": 8}),
    "gptq in order of activations": (gptq_packer(4, 32, shuffled=True), {"quant_method": "gptq", "bits": 4}),
    "gptq of 3 bits": (gptq_packer(3, 32), {"quant_method": "gptq", "bits": 3}),
    "awq": (pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "int8": (pack_int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)),
    "w4a16": (pack_w4a16, compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)),
    "w8a16 in order": (
        pack_w8a16_in_order, compressed("pack-quantized", num_bits=8, type="int", actorder="group", group_size=32)
    ),
    "fp8": (pack_fp8, compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "fp8 in blocks": (pack_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 48]}),
}  # fmt: skip


def assert_same_divided(path: str | Path, size: int = 2, tolerance: float = 1e-5, **options: Any) -> list[LoadedModel]:
    """Logits and weights of ranks equal those of one rank."""
    one = load(path, **options)
    expected = logits_of(one, TOKENS)
    weights = {name: one.weights.get(name) for name in one.weights.names()}

    def run_rank(collectives: Collectives) -> tuple[LoadedModel, torch.Tensor]:
        loaded = load(path, collectives, **options)
        for name, value in weights.items():
            assert torch.allclose(loaded.weights.get(name), value, atol=1e-6), name
        return loaded, logits_of(loaded, TOKENS)

    found = run_ranks(size, run_rank)
    for _, logits in found:
        assert torch.equal(logits, found[0][1])
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    return [loaded for loaded, _ in found]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save(LlamaConfig(**SIZES), folder)
    return str(folder)


@pytest.mark.parametrize("name", list(FORMATS))
def test_quantized_checkpoints_are_divided(base: str, tmp_path: Path, name: str) -> None:
    pack, settings = FORMATS[name]
    write_packed(base, tmp_path, pack, settings)
    assert_same_divided(tmp_path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_gguf_files_are_divided(base: str, tmp_path: Path, kind: str) -> None:
    write_gguf(base, tmp_path, "llama", kind)
    assert_same_divided(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_weights_quantized_at_loading_are_divided(models: Callable[[str], str], name: str, quantize: str) -> None:
    """With 8 bits, scales are those of whole rows, so the codes are those of one rank. In 4 bits, groups begin anew in
    each rank's part where that is no multiple of a group, so numbers differ by less than a step."""
    path = models(name)
    if quantize == "int8":
        assert_same_divided(path, quantize="int8", tolerance=5e-4)
        return
    expected = logits_of(load(path, quantize="nf4"), TOKENS)
    plain = logits_of(load(path), TOKENS)
    for logits in run_ranks(2, lambda collectives: logits_of(load(path, collectives, quantize="nf4"), TOKENS)):
        assert (logits - plain).norm() < 1.3 * (expected - plain).norm()


def test_a_set_weight_is_quantized_with_scales_of_whole_rows(models: Callable[[str], str]) -> None:
    path, name = models("llama"), "model.layers.1.mlp.down_proj.weight"
    fresh = torch.randn(48, 96, generator=torch.Generator().manual_seed(2))
    one = load(path, quantize="int8").weights
    one.set(name, fresh)

    def run_rank(collectives: Collectives) -> torch.Tensor:
        weights = load(path, collectives, quantize="int8").weights
        weights.set(name, fresh)
        return weights.get(name)

    assert all(torch.equal(found, one.get(name)) for found in run_ranks(2, run_rank))


@pytest.mark.parametrize(
    ("begin", "end", "group"), [(32, 64, 32), (24, 48, 8), (0, 40, 32), (40, 64, 24), (24, 64, 8), (2, 9, 7)]
)
def test_groups_are_refined_where_a_part_begins_inside_one(begin: int, end: int, group: int) -> None:
    generator = torch.Generator().manual_seed(begin)
    whole = QuantizedTensor(
        torch.randint(16, (6, 64), generator=generator).to(torch.uint8), torch.rand(6, 2, generator=generator),
        torch.randint(16, (6, 2), generator=generator), 4, 32,
    )  # fmt: skip
    shard = Shard((6, 64), 1, ((begin, end),))
    part = whole.part(shard, torch.float32)
    assert isinstance(part, QuantizedTensor)
    assert part.group == group
    assert torch.equal(part.dense(torch.float32), take(shard, whole.dense(torch.float32)))
    assert torch.allclose(part.layout(torch.float32, torch.device("cpu")).get(), part.dense(torch.float32))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_packed_one_by_one_are_divided(models: Callable[[str], str], tmp_path: Path, name: str) -> None:
    packed: dict[str, torch.Tensor] = {}
    for weight, tensor in load_file(Path(models(name)) / "model.safetensors").items():
        is_packed = ".experts." in weight and tensor.shape[1] % 16 == 0
        packed |= gptq(weight, round_to_nearest(tensor, 8, 16), 8) if is_packed else {weight: tensor}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(models(name)) / "config.json").read_text())
    for loaded in assert_same_divided(tmp_path, packed=PackedCheckpoint("gptq", None, 8)):
        layouts = [layout for module in loaded.model.modules() if isinstance(module, Experts)
                   for each in module.layouts.values() for layout in each]  # fmt: skip
        assert {type(layout) for layout in layouts} == {QuantizedWeight}


@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_weights_that_the_model_has_transposed_are_divided(tmp_path: Path, shuffled: bool) -> None:
    """Also square ones, whose shape does not show that they are."""
    config = GPT2Config(**{**CONFIGS["gpt2"].to_dict(), "n_embd": 64})
    save(config, tmp_path)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        is_packed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        packed |= gptq(name, round_to_nearest(tensor.t(), 4, 32, shuffled=shuffled), 4) if is_packed else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, tmp_path / "model.safetensors")
    assert_same_divided(tmp_path, packed=PackedCheckpoint("gptq", None, 4))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_with_an_adapter_added_are_divided(models: Callable[[str], str], tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "adapter", transposed=name == "gpt2")
    assert_same_divided(models(name), adapter_dir=str(tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_random_weights_are_divided(models: Callable[[str], str], name: str) -> None:
    assert_same_divided(models(name), dummy=True)


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "gptq", "awq", "Q8_0", "Q4_0", "F16"])
def test_only_the_ranks_part_of_a_file_is_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """No buffer is larger than the rank's part of the largest weight, or than one block of rows."""
    whole = tmp_path / "whole"
    save(LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 1}), whole)
    folder, size = whole, 4.0
    if kind in ("gptq", "awq"):
        folder, size = tmp_path / kind, 0.5
        write_packed(str(whole), folder, *FORMATS[kind])
    elif kind != "plain":
        folder, size = tmp_path / kind, {"Q8_0": 34 / 32, "Q4_0": 18 / 32, "F16": 2.0}[kind]
        write_gguf(str(whole), folder, "llama", kind)
    taken: list[int] = []
    lock = threading.Lock()
    original = checkpoint.BufferPool.take

    def take_noted(pool: checkpoint.BufferPool, size: int) -> Any:
        with lock:
            taken.append(size)
        return original(pool, size)

    monkeypatch.setattr(checkpoint.BufferPool, "take", take_noted)
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 1 << 14)
    run_ranks(2, lambda collectives: len(load(folder, collectives).weights.names()))
    assert 0.9 * 256 * 2048 * size / 2 <= max(taken) <= 256 * 2048 * size / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "shard",
    [
        Shard((7, 33), 0, ((2, 5),)),
        Shard((7, 33), 1, ((11, 30),)),
        Shard((9, 40), 0, ((1, 2), (4, 6), (8, 9))),
        Shard((3, 12, 5), 1, ((2, 4), (8, 10))),
        Shard((3, 12, 5), 2, ((1, 4),)),
        Shard((2, 40000, 3), 1, ((100, 39000),)),
        Shard((5, 300000), 1, ((7, 150000),)),
    ],
    ids=lambda shard: f"{shard.whole} {shard.dim}",
)
def test_parts_read_from_a_file_equal_parts_of_the_whole(tmp_path: Path, shard: Shard, dtype: torch.dtype) -> None:
    whole = torch.randint(-99, 99, shard.whole, generator=torch.Generator().manual_seed(4)).to(dtype)
    save_file({"other": torch.ones(3), "weight": whole}, tmp_path / "model.safetensors")
    torch.save({"weight": whole}, tmp_path / "model.bin")
    for file in ("model.safetensors", "model.bin"):
        stored = checkpoint.open_file(tmp_path / file)["weight"]
        assert stored.read_shard is not None
        found = stored.read_shard(shard)
        assert tuple(found.shape) == shard.shape
        assert torch.equal(found, take(shard, whole))


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_shape", [(48, 48), (96, 24)], ids=["as wide as a part", "as long as the whole"])
def test_a_weight_of_another_shape_is_named_with_the_whole_shape(
    models: Callable[[str], str], tmp_path: Path, file_shape: tuple[int, int]
) -> None:
    state = load_file(Path(models("llama")) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, name: torch.zeros(file_shape)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(models("llama")) / "config.json").read_text())
    with pytest.raises(
        StartupError, match=rf"up_proj.weight has the shape \(96, 48\) by config.json, and \({file_shape[0]}, "
    ):
        run_ranks(2, lambda collectives: load(tmp_path, collectives))


def test_too_many_ranks_are_refused_with_sizes_that_work(models: Callable[[str], str], tmp_path: Path) -> None:
    """Before anything is read: the folder has no weights at all but an empty file of them."""
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((Path(models("llama")) / "config.json").read_text())
    words = r"over 5 ranks: 4 heads cannot be divided by 5\. Start with --tp-size 1 or 2 or 3 or 4\."
    with pytest.raises(StartupError, match="LlamaForCausalLM cannot be divided " + words):
        run_ranks(5, lambda collectives: load(tmp_path, collectives))


def test_an_architecture_that_would_compute_something_else_is_refused(
    models: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its MLPs, ranks have other halves of gate and up than of down."""
    original = partition_plan._divide_inputs

    def wrong(plan: Any, path: str, module: Any, ranges: Any, unit: int) -> None:
        original(plan, path, module, [(0, ranges[0][1])] * len(ranges) if "mlp" in path else ranges, unit)

    monkeypatch.setattr(partition_plan, "_divide_inputs", wrong)
    with pytest.raises(StartupError, match="its small twin, divided, computes something else"):
        run_ranks(2, lambda collectives: load(models("llama"), collectives))


UNKNOWN_ATTENTION = {
    "heads in pairs": DiffLlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "queries, keys and values in blocks": CodeGenConfig(
        vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128, rotary_dim=8, n_inner=96
    ),
    "one KV head in the projection of queries": GPTBigCodeConfig(
        vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=96
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN_ATTENTION)
def test_attention_that_no_rule_divides_is_whole_on_every_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The MLPs beside it and the vocabulary are divided, and weights round trip as ever."""
    save(UNKNOWN_ATTENTION[kind], tmp_path)
    whole = load(tmp_path)
    logits = logits_of(whole, TOKENS)
    expected, fresh = two_sets_of_weights(str(tmp_path))

    def run_rank(collectives: Collectives) -> tuple[torch.Tensor, int]:
        loaded = load(tmp_path, collectives)
        found = logits_of(loaded, TOKENS)
        assert_round_trip(loaded, expected, fresh)
        return found, stored_numbers(loaded)

    with caplog.at_level(logging.WARNING):
        found = run_ranks(2, run_rank)
    assert re.search(r"\w+Attention is not divided: each rank holds its weights and KV cache", caplog.text)
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][0] - logits).abs().max() < 1e-5 * logits.abs().max()
    assert all(numbers < 0.85 * stored_numbers(whole) for _, numbers in found)


def test_ranks_stop_when_one_of_them_cannot_start(models: Callable[[str], str]) -> None:
    failed = []

    def run_rank(collectives: Collectives) -> LoadedModel:
        if collectives.rank == 1:
            raise StartupError("its file is missing")
        try:
            return load(models("llama"), collectives)
        except RankLostError:
            failed.append(collectives.rank)
            raise

    with pytest.raises(StartupError, match="its file is missing"):
        run_ranks(2, run_rank)
    assert failed == [0]


def test_the_layers_that_exchange_are_those_of_sums_and_vocabulary(models: Callable[[str], str]) -> None:
    [loaded, _] = run_ranks(2, lambda collectives: load(models("qwen2"), collectives))
    names = {path: type(module) for path, module in loaded.model.named_modules()}
    assert names["model.layers.0.self_attn.o_proj"] is RowParallelLinear
    assert names["model.layers.0.mlp.down_proj"] is RowParallelLinear
    assert names["model.layers.0.self_attn.q_proj"] is Linear
    assert names["lm_head"] is VocabParallelHead
    assert names["model.embed_tokens"] is VocabParallelEmbedding
    config = json.loads((Path(models("qwen2")) / "config.json").read_text())
    assert loaded.model.config.num_attention_heads == config["num_attention_heads"]


def test_what_adapters_add_to_a_partial_sum_is_summed_with_it() -> None:
    weight, x = torch.randn(6, 8), torch.randn(3, 8)
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    bias = torch.randn(6)

    def run_rank(collectives: Collectives) -> torch.Tensor:
        from fastserve.engine.layers.layouts.plain import PlainWeight

        part = slice(4 * collectives.rank, 4 * collectives.rank + 4)
        layer = RowParallelLinear(PlainWeight(weight[:, part]), bias, collectives)
        layer.delta = lambda inputs, out: out.add_(inputs @ down[:, part].t() @ up.t())
        out: torch.Tensor = layer(x[:, part])
        return out

    for out in run_ranks(2, run_rank):
        assert torch.allclose(out, x @ (weight + up @ down).t() + bias, atol=1e-5)
