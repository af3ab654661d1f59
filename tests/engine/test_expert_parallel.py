"""Experts given out whole over ranks (`--enable-expert-parallel`) compute what one rank computes with all of them.

The ranks are threads here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.loading import checkpoint
from fastserve.engine.loading.division_check import try_partition
from fastserve.engine.loading.loader import LoadedModel
from fastserve.engine.loading.partition_plan import plan_partition
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.thread_collectives import run_ranks
from fastserve.errors import StartupError

from .conftest import CONFIGS, SHAPE, TinyModels, logits_of
from .packers import awq, gptq, round_to_nearest
from .test_formats import compressed, pack_fp8_blocks, pack_int8
from .test_partition import (
    MORE_CONFIGS,
    PARAMS,
    TOKENS,
    assert_equal_answers,
    assert_round_trip,
    load,
    paths_of,
    save,
    start_and_run,
    two_sets_of_weights,
)
from .test_partition_plan import on_meta

SHAPE_OF_MOE: dict[str, Any] = {**SHAPE, "head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, PretrainedConfig] = {
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "mixtral": CONFIGS["mixtral"],
    "gpt_oss": CONFIGS["gpt_oss"],
    "deepseek": MORE_CONFIGS["latent attention"],
    "five experts": Qwen3MoeConfig(**SHAPE_OF_MOE, num_experts=5),
    "dense layers between": Qwen3MoeConfig(**SHAPE_OF_MOE, num_experts=6, mlp_only_layers=[1]),
}


@pytest.fixture(scope="module")
def mixtures(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The path of a tiny model by its name in MIXTURES."""
    return paths_of(MIXTURES, tiny_models, tmp_path_factory.mktemp("mixtures"))


def experts_of(loaded: LoadedModel) -> list[Experts]:
    return [module for module in loaded.model.modules() if isinstance(module, Experts)]


def load_part(path: str | Path, collectives: Collectives, **options: Any) -> LoadedModel:
    return load(path, collectives, expert_parallel=True, **options)


# ---- equality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in MIXTURES for size in (2, 4)] + [("five experts", 3)]
)
def test_logits_equal_those_of_one_and_whole_weights_round_trip(
    mixtures: Callable[[str], str], name: str, size: int
) -> None:
    path = mixtures(name)
    logits = logits_of(load(path), TOKENS)
    expected, fresh = two_sets_of_weights(path)

    def run_rank(collectives: Collectives) -> tuple[torch.Tensor, list[range]]:
        loaded = load_part(path, collectives)
        found = logits_of(loaded, TOKENS)
        assert_round_trip(loaded, expected, fresh)
        for layer in experts_of(loaded):
            assert all(len(layouts) == len(layer.own) for layouts in layer.layouts.values())
        return found, [layer.own for layer in experts_of(loaded)]

    found = run_ranks(size, run_rank)
    assert all(torch.equal(each, found[0][0]) for each, _ in found)  # bit for bit
    assert (found[0][0] - logits).abs().max() < 1e-5 * logits.abs().max()
    config = MIXTURES[name]
    count = (
        getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None) or config.num_local_experts
    )
    for own in zip(*(own for _, own in found), strict=True):
        assert [expert for part in own for expert in part] == list(range(count))
        assert max(map(len, own)) - min(map(len, own)) <= 1


def test_answers_of_ranks_equal_those_of_one(mixtures: Callable[[str], str]) -> None:
    """In batches with chunked prefill and prefix hits."""
    path = mixtures("gpt_oss")
    expected = start_and_run(path)
    found = run_ranks(2, lambda collectives: start_and_run(path, collectives, enable_expert_parallel=True))
    assert found[0] == found[1]  # bit for bit
    assert len(expected) == 5
    assert all(len(answer) <= PARAMS.max_tokens for answer in expected.values())
    assert_equal_answers(found[0], expected)


class NormedExperts(torch.nn.Module):  # type: ignore[misc]
    """Experts whose outputs are each normed, as some models do."""

    is_transposed = has_bias = False
    has_gate = has_post_expert_norm = True
    num_experts = 3

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(gate_up)
        self.down_proj = torch.nn.Parameter(down)
        self.post_expert_norm = torch.nn.LayerNorm(down.shape[1])

    def _apply_gate(self, joint: torch.Tensor) -> torch.Tensor:
        gate, up = joint.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def test_norms_of_an_experts_output_are_over_whole_outputs() -> None:
    torch.manual_seed(0)
    gate_up, down, x = torch.randn(3, 16, 6), torch.randn(3, 6, 8), torch.randn(7, 6)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    parts = [range(1), range(1, 3)]

    def run_rank(collectives: Collectives) -> torch.Tensor:
        own = parts[collectives.rank]
        original = NormedExperts(gate_up[own.start : own.stop], down[own.start : own.stop])
        with torch.inference_mode():
            out: torch.Tensor = Experts(original, collectives, own)(x, index, weights)
        return out

    with torch.inference_mode():
        expected = Experts(NormedExperts(gate_up, down))(x, index, weights)
    for out in run_ranks(2, run_rank):
        assert torch.allclose(out, expected, atol=1e-5)


# ---- formats ----------------------------------------------------------------------------------------------------


def pack_awq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return awq(name, round_to_nearest(weight, 4, 16))


def pack_gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return gptq(name, round_to_nearest(weight, 4, 16, shuffled=True), 4)


FORMATS: dict[str, tuple[Callable[[str, torch.Tensor], dict[str, torch.Tensor]], dict[str, Any], bool]] = {
    "gptq": (pack_gptq, {"quant_method": "gptq", "bits": 4}, True),
    "awq": (
        pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, True,
    ),
    "int8": (
        lambda name, weight: pack_int8(name, weight)[0],
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), True,
    ),
    "fp8": (
        lambda name, weight: pack_fp8_blocks(name, weight)[0],
        {"quant_method": "fp8", "weight_block_size": [32, 48]}, False,
    ),
}  # fmt: skip
"""How a weight is packed, settings in config.json, and whether it stays packed."""


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("name", ["qwen3_moe", "five experts"])
def test_packed_experts_are_given_out(mixtures: Callable[[str], str], tmp_path: Path, name: str, kind: str) -> None:
    pack, settings, stays = FORMATS[kind]
    packed: dict[str, torch.Tensor] = {}
    for weight, tensor in load_file(Path(mixtures(name)) / "model.safetensors").items():
        packed |= pack(weight, tensor) if ".experts." in weight else {weight: tensor}
    save_file({key: tensor.contiguous() for key, tensor in packed.items()}, tmp_path / "model.safetensors")
    config = type(MIXTURES[name])(**MIXTURES[name].to_diff_dict(), quantization_config=settings)
    config.save_pretrained(tmp_path)
    assert_same_given_out(tmp_path, QuantizedWeight if stays else None)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_experts_quantized_at_loading_are_given_out(mixtures: Callable[[str], str], name: str, quantize: str) -> None:
    """Their codes are those of one rank. In 4 bits, only those: attention is divided inside of groups."""
    tolerance = 5e-4 if quantize == "int8" else None
    assert_same_given_out(mixtures(name), QuantizedWeight, tolerance, quantize=quantize)


def assert_same_given_out(
    path: str | Path, layout: type | None, tolerance: float | None = 1e-5, **options: Any
) -> None:
    """Experts of two ranks are those of one rank, to the bit; so are logits, to the tolerance."""
    one = load(path, **options)
    expected = logits_of(one, TOKENS)
    weights = {name: one.weights.get(name) for name in one.weights.names() if ".experts." in name}
    assert weights

    def run_rank(collectives: Collectives) -> torch.Tensor:
        loaded = load_part(path, collectives, **options)
        for name, value in weights.items():
            assert torch.equal(loaded.weights.get(name), value), name
        for layer in experts_of(loaded):
            layouts = [each for layouts in layer.layouts.values() for each in layouts]
            assert len(layouts) == 2 * len(layer.own)
            assert layout is None or {type(each) for each in layouts} == {layout}
        return logits_of(loaded, TOKENS)

    found = run_ranks(2, run_rank)
    assert torch.equal(found[0], found[1])
    if tolerance is not None:
        assert (found[0] - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_set_expert_is_quantized_where_it_is(mixtures: Callable[[str], str]) -> None:
    path, name = mixtures("five experts"), "model.layers.2.mlp.experts.down_proj"
    one = load(path, quantize="int8").weights
    fresh = torch.randn(one.get(name).shape, generator=torch.Generator().manual_seed(2))
    one.set(name, fresh)

    def run_rank(collectives: Collectives) -> torch.Tensor:
        weights = load_part(path, collectives, quantize="int8").weights
        weights.set(name, fresh)
        return weights.get(name)

    assert all(torch.equal(found, one.get(name)) for found in run_ranks(2, run_rank))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_are_given_out_with_them(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    from .adapters import Adapters  # it skips the test without PEFT

    lora = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    folder = Adapters(tiny_models, tmp_path).make(tiny_models.path(name), tmp_path / "adapter", lora)
    assert_same_given_out(tiny_models.path(name), None, adapter_dir=str(folder))


# ---- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["a tensor for each expert", "one tensor for all", "fp8 in one tensor"])
def test_each_rank_reads_its_own_experts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    shape = {**SHAPE_OF_MOE, "num_hidden_layers": 1, "moe_intermediate_size": 640}
    save(Qwen3MoeConfig(**shape, num_experts=8), tmp_path)
    if form != "a tensor for each expert":
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        if form == "fp8 in one tensor":
            for name in [name for name in state if ".experts." in name]:
                state[name] = state[name].to(torch.float8_e4m3fn)
                state[f"{name}_scale_inv"] = torch.rand(8, 1, 1) + 0.5
            settings = {"quant_method": "fp8", "weight_block_size": [2048, 2048]}
            Qwen3MoeConfig(**shape, num_experts=8, quantization_config=settings).save_pretrained(tmp_path)
        save_file(state, tmp_path / "model.safetensors")
    experts_bytes = 8 * 3 * 640 * 48 * (1 if form == "fp8 in one tensor" else 4)
    expected = logits_of(load(tmp_path), TOKENS)
    taken: list[int] = []
    original = checkpoint.BufferPool.take

    def take_noted(pool: checkpoint.BufferPool, size: int) -> Any:
        taken.append(size)
        return original(pool, size)

    monkeypatch.setattr(checkpoint.BufferPool, "take", take_noted)
    caplog.set_level(logging.INFO, "fastserve.engine")
    for logits in run_ranks(2, lambda collectives: logits_of(load_part(tmp_path, collectives), TOKENS)):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    large = [size for size in taken if size > 50_000]
    assert 0.9 * experts_bytes <= sum(large) <= 1.1 * experts_bytes
    assert max(large) <= experts_bytes * 2 / 3 / 2  # a rank's part of the larger weight
    assert "rank 0 has experts 0 to 3 of 8 in 1 layers" in caplog.text
    assert "rank 1 has experts 4 to 7 of 8 in 1 layers" in caplog.text


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_checkpoint_with_another_number_of_experts_is_refused(
    mixtures: Callable[[str], str], tmp_path: Path, extra: int
) -> None:
    """Which experts a rank has is known by their number."""
    state = load_file(Path(mixtures("five experts")) / "model.safetensors")
    last = {name: tensor for name, tensor in state.items() if ".experts.4." in name}
    assert last
    if extra > 0:
        state |= {name.replace(".experts.4.", ".experts.5."): tensor.clone() for name, tensor in last.items()}
    else:
        state = {name: tensor for name, tensor in state.items() if name not in last}
    save_file(state, tmp_path / "model.safetensors")
    MIXTURES["five experts"].save_pretrained(tmp_path)
    words = (
        rf"model.safetensors: model.layers.\d.mlp.experts.\w+ is of 5 experts by config.json, and {5 + extra} tensors"
    )
    with pytest.raises(StartupError, match=words):
        run_ranks(2, lambda collectives: load_part(tmp_path, collectives))


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    with pytest.raises(StartupError, match=r"LlamaForCausalLM has no experts .* without --enable-expert-parallel"):
        run_ranks(2, lambda collectives: load_part(path, collectives))


def test_fewer_experts_than_ranks_are_refused_with_sizes_that_work() -> None:
    config = MixtralConfig(**{**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 8}, num_local_experts=4)
    words = r"over 6 ranks: it has 4 experts, and each rank needs one\. Start with --tp-size 1 or 2 or 3 or 4\."
    with pytest.raises(StartupError, match=words):
        plan_partition(on_meta(config), 6, expert_parallel=True)
    assert plan_partition(on_meta(config), 6).experts


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_latent_attention_with_large_heads_is_tried_on_a_twin_with_small_ones(expert_parallel: bool) -> None:
    """The part of a head that rotates, and the whole head, have sizes of their own names too."""
    config = DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4}, q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=64, v_head_dim=128,
        qk_nope_head_dim=128, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    model = on_meta(config)
    assert config.head_dim == 64
    found = run_ranks(2, lambda collectives: try_partition(model, collectives, expert_parallel=expert_parallel))
    assert all(not partition.plan.undivided for partition in found)
