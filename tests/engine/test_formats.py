"""Quantized checkpoints of each format, packed by the test itself: logits equal those of the dequantized model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from fastserve.engine.layers.experts import Experts
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.loading.formats import fp8
from fastserve.engine.loading.formats.source import unpack_bits
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.settings import PackedCheckpoint, WeightOptions
from fastserve.errors import StartupError

from .conftest import TinyModels, logits_of, plain
from .packers import Pack, Rounded, awq, gptq, pack_stream, packed_integers, round_to_nearest, write_packed

SIZES: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.25,
}  # fmt: skip
"""Widths are multiples of the word and group size of each format."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("base"))


def save(config: Any, folder: Path) -> str:
    torch.manual_seed(11)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def load(folder: Path | str, dtype: str = "float32", **options: Any) -> LoadedModel:
    return load_model(
        str(folder), "cpu", dtype, trust_remote_code=False, progress=lambda *_: None, options=WeightOptions(**options)
    )


def assert_same_logits(loaded: LoadedModel, expected: PreTrainedModel, tolerance: float = 2e-4) -> None:
    """Relative to the largest logit."""
    tokens = torch.randint(2, 160, (1, 17), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        own = expected(input_ids=tokens, use_cache=False).logits[0]
    found = logits_of(loaded, tokens[0].tolist())
    assert (found - own).abs().max() <= tolerance * own.abs().max()


def layouts(loaded: LoadedModel) -> list[type]:
    return [type(module.layout) for module in loaded.model.modules() if isinstance(module, Linear)]


def gptq_packer(bits: int, group: int, *, shuffled: bool = False, v2: bool = False) -> Pack:
    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, bits, group, shuffled=shuffled)
        return gptq(name, rounded, bits, v2=v2), rounded.dense()

    return pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_inverts_packing(bits: int) -> None:
    numbers = torch.randint(1 << bits, (96, 5), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack_bits(pack_stream(numbers, bits), bits).long(), numbers)


def test_three_bits_lie_across_words() -> None:
    """The eleventh number has two bits in the first word and one in the second."""
    numbers = torch.zeros(32, 1, dtype=torch.long)
    numbers[10] = 0b101
    words = pack_stream(numbers, 3)
    assert words.flatten().tolist() == [1 << 30, 1, 0]
    assert torch.equal(unpack_bits(words, 3).long(), numbers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group", "shuffled", "v2"), [(32, False, False), (-1, False, True), (32, True, False), (32, True, True)]
)
def test_gptq_by_its_settings(base: str, tmp_path: Path, bits: int, group: int, shuffled: bool, v2: bool) -> None:
    settings = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }  # fmt: skip
    expected = write_packed(base, tmp_path, gptq_packer(bits, group, shuffled=shuffled, v2=v2), settings)
    loaded = load(tmp_path)
    assert layouts(loaded).count(QuantizedWeight) == 14
    assert_same_logits(loaded, expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(loaded.weights.get(name), expected.get_parameter(name), atol=1e-5)


@pytest.mark.parametrize("file", ["gptq_model-4bit-32g.safetensors", "quantized.pt"])
def test_a_bare_gptq_file_beside_a_base_model(base: str, tmp_path: Path, file: str) -> None:
    expected = write_packed(base, tmp_path, gptq_packer(4, 32), None, file)
    flags = PackedCheckpoint("gptq", str(tmp_path / file), 4, 32, act_order=True)
    assert_same_logits(load(base, packed=flags), expected)
    # The same with the folder of the file, and with that folder as the model's.
    assert_same_logits(load(base, packed=PackedCheckpoint("gptq", str(tmp_path))), expected)
    assert_same_logits(load(tmp_path, packed=PackedCheckpoint("gptq", None, 4)), expected)


def test_only_layers_in_a_packed_file_come_from_it(base: str, tmp_path: Path) -> None:
    """All other weights come from the base model."""
    expected = write_packed(base, tmp_path, gptq_packer(4, 32), None)
    packed = {name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if "proj" in name}
    save_file(packed, tmp_path / "layers.safetensors")
    assert_same_logits(load(base, packed=PackedCheckpoint("gptq", str(tmp_path / "layers.safetensors"))), expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bits": 8}, r"--gptq-wbits 8: \S+ in \S+ is packed in 4 bits; start with --gptq-wbits 4\."),
        ({"group_size": 16}, r"--gptq-groupsize 16: \S+ in \S+ has 3 groups of 96 inputs; .* --gptq-groupsize 32\."),
        ({"path": "/no/such/file.pt"}, r"--gptq-ckpt /no/such/file.pt: there is no such file or folder\."),
    ],
)
def test_gptq_flags_that_contradict_the_file(base: str, tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    write_packed(base, tmp_path, gptq_packer(4, 32), None)
    with pytest.raises(StartupError, match=words):
        load(tmp_path, packed=PackedCheckpoint("gptq", **flags))


def test_act_order_needs_its_tensor(base: str, tmp_path: Path) -> None:
    def without_order(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        stored, values = gptq_packer(4, 32)(name, weight)
        return {key: tensor for key, tensor in stored.items() if not key.endswith("g_idx")}, values

    expected = write_packed(base, tmp_path, without_order, None)
    assert_same_logits(load(tmp_path, packed=PackedCheckpoint("gptq")), expected)
    with pytest.raises(StartupError, match=r"no tensor \S+\.g_idx"):
        load(tmp_path, packed=PackedCheckpoint("gptq", act_order=True))


def test_a_model_that_is_not_packed_is_no_gptq_model(base: str) -> None:
    with pytest.raises(StartupError, match=r"GPTQ: no tensor of the checkpoint ends in \.qweight"):
        load(base, packed=PackedCheckpoint("gptq", None, 4))


def awq_packer(group: int) -> Pack:
    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, 4, group)
        return awq(name, rounded), rounded.dense()

    return pack


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("by_flags", [False, True])
def test_awq(base: str, tmp_path: Path, group: int, by_flags: bool) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    expected = write_packed(base, tmp_path, awq_packer(group), None if by_flags else settings)
    packed = PackedCheckpoint("awq", None, 4, None if group == -1 else group) if by_flags else None
    loaded = load(tmp_path, packed=packed)
    assert layouts(loaded).count(QuantizedWeight) == 14
    assert_same_logits(loaded, expected)
    if by_flags and group == 32:
        with pytest.raises(StartupError, match=r"--awq-groupsize 16: .* start with --awq-groupsize 32"):
            load(tmp_path, packed=PackedCheckpoint("awq", None, 4, 16))


def test_awq_of_another_version_is_refused(base: str, tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}
    write_packed(base, tmp_path, gptq_packer(4, 32), settings)
    with pytest.raises(StartupError, match="AWQ checkpoints of version gemv are not served"):
        load(tmp_path)


def compressed(name: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def pack_int8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}, codes * scale.float()


def pack_w4a16(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rounded = round_to_nearest(weight, 4, 32)
    return packed_integers(name, rounded, 4), rounded.dense()


def pack_w8a16_in_order(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rounded = round_to_nearest(weight, 8, 32, shuffled=True)
    return packed_integers(name, rounded, 8), rounded.dense()


def pack_w4a16_symmetric(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Without zero points: half their range is added to the codes."""
    scale = (weight.view(weight.shape[0], -1, 32).abs().amax(2) / 7).bfloat16()
    wide = scale.float().repeat_interleave(32, dim=1)
    codes = (weight / wide).round().clamp(-8, 7)
    stored = pack_stream((codes + 8).long().t().contiguous(), 4).t().contiguous()
    return {f"{name}_packed": stored, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}, codes * wide


def pack_int8_of_one_scale(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """With scale and zero point for the whole tensor, and with settings for quantized activations."""
    scale, zero = weight.abs().amax().view(1) / 120, torch.tensor([5], dtype=torch.int8)
    codes = (weight / scale + 5).round().clamp(-128, 127)
    layer = name.removesuffix(".weight")
    parts = {name: codes.to(torch.int8), f"{name}_scale": scale, f"{name}_zero_point": zero}
    return {**parts, f"{layer}.input_scale": torch.ones(1)}, (codes - 5) * scale


def pack_fp8_of_one_scale(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax().view(1) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def pack_fp8(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


def pack_fp8_blocks(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    out, width = weight.shape
    scale = torch.rand(-(-out // 32), -(-width // 48)) + 0.5
    wide = scale.repeat_interleave(32, 0)[:out].repeat_interleave(48, 1)[:, :width]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * wide


def pack_fp8_static(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One scale for the whole weight, without a shape, and one for activations, as Mistral publishes its models."""
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    layer = name.removesuffix(".weight")
    parts = {name: codes, f"{name}_scale_inv": scale, f"{layer}.activation_scale": torch.ones(())}
    return parts, codes.float() * scale


def pack_fp8_outputs(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * scale


@pytest.mark.parametrize(
    ("pack", "settings", "stays"),
    [
        (pack_int8, compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True), True),
        (pack_w4a16, compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), True),
        (
            pack_w8a16_in_order,
            compressed("pack-quantized", num_bits=8, type="int", actorder="group", group_size=32),
            True,
        ),
        (pack_w4a16_symmetric, compressed("pack-quantized", num_bits=4, type="int", symmetric=True), True),
        (pack_int8_of_one_scale, compressed("int-quantized", num_bits=8, type="int", strategy="tensor"), True),
        (pack_fp8_of_one_scale, compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), False),
        (pack_fp8, compressed("float-quantized", num_bits=8, type="float", strategy="channel"), False),
        (pack_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 48]}, False),
        (
            pack_fp8_static,
            {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static", "dequantize": False},
            False,
        ),
        (pack_fp8_outputs, {"quant_method": "fp8"}, False),
    ],
    ids=[
        "int8",
        "w4a16",
        "w8a16 in order",
        "w4a16 symmetric",
        "int8 of one",
        "fp8 of one",
        "fp8",
        "fp8-blocks",
        "fp8 with one scale",
        "fp8 with a scale for each output",
    ],
)
def test_compressed_tensors_and_fp8(
    base: str, tmp_path: Path, pack: Pack, settings: dict[str, Any], stays: bool
) -> None:
    expected = write_packed(base, tmp_path, pack, settings)
    loaded = load(tmp_path)
    assert layouts(loaded).count(QuantizedWeight) == (14 if stays else 0)
    assert_same_logits(loaded, expected)


def test_fp8_scales_of_experts_are_one_for_each_or_for_blocks() -> None:
    weight = torch.randn(3, 40, 64)
    for scale, wide in (
        (one := torch.rand(3, 1, 1), one),
        (torch.rand(()), None),
        (blocks := torch.rand(3, 2, 2), blocks.repeat_interleave(32, 1)[:, :40].repeat_interleave(32, 2)),
    ):
        expected = weight * (scale if wide is None else wide)
        assert torch.equal(fp8.scaled(weight.clone(), scale, (32, 32)), expected)
    with pytest.raises(ValueError, match=r"scales of the shape \(5, 7\) are neither one"):
        fp8.scaled(torch.ones(40, 64), torch.ones(5, 7), (32, 32))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant_method": "hqq"},
            r"quantized by hqq, which is not served; served are awq, compressed-tensors, fp8, gptq",
        ),
        (compressed("nvfp4-pack-quantized"), "format nvfp4-pack-quantized are not served"),
        ({"quant_method": "gptq"}, r"no tensor of the checkpoint ends in \.qweight"),
    ],
)
def test_what_is_not_served_is_named(base: str, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(StartupError, match=words):
        load(tmp_path)


def test_packed_weights_are_not_quantized_again(base: str, tmp_path: Path) -> None:
    write_packed(base, tmp_path, gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(StartupError, match=r"--load-8bit: the checkpoint is quantized already \(gptq\)"):
        load(tmp_path, quantize="int8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda state: state.pop("model.layers.0.mlp.up_proj.scales"),
            r"no tensor model\.layers\.0\.mlp\.up_proj\.scales",
        ),
        (
            lambda state: state.update({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(64, dtype=torch.int32)}),
            r"safetensors: what is stored for model\.layers\.0\.mlp\.up_proj\.weight does not fit together: g_idx",
        ),
        (
            lambda state: state.update({"model.layers.0.mlp.up_proj.qzeros": torch.zeros(2, 5, dtype=torch.int32)}),
            r"the shapes of model\.layers\.0\.mlp\.up_proj are not those of GPTQ",
        ),
        (
            lambda state: state.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}),
            r"model\.layers\.0\.mlp\.up_proj\.bias is not zero, and LlamaForCausalLM has no such bias",
        ),
    ],
    ids=["missing", "order", "shape", "bias"],
)
def test_damaged_layers_are_named(
    base: str, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    write_packed(base, tmp_path, gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4})
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=words):
        load(tmp_path)


def test_a_bias_of_zeros_that_packers_add_is_left_out(base: str, tmp_path: Path) -> None:
    expected = write_packed(base, tmp_path, gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4})
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "model.layers.0.mlp.up_proj.bias": torch.zeros(96)}, tmp_path / "model.safetensors")
    assert_same_logits(load(tmp_path), expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_that_are_packed_one_by_one_stay_so(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    """Even if the model has one tensor for all experts, with gate and up concatenated."""
    shutil.copytree(tiny_models.path(name), tmp_path, dirs_exist_ok=True)
    # Copies, since loaded tensors may be mapped from the file, which is overwritten.
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".experts." in name and tensor.shape[1] % 16 == 0:
            rounded = round_to_nearest(tensor, 8, 16)
            packed |= gptq(name, rounded, 8)
            state[name] = rounded.dense()
        else:
            packed[name] = tensor
    assert any(name.endswith(".qweight") for name in packed)
    save_file(state, tmp_path / "model.safetensors")
    expected = plain(tmp_path)
    save_file(packed, tmp_path / "model.safetensors")
    loaded = load(tmp_path, packed=PackedCheckpoint("gptq", None, 8))
    assert_same_logits(loaded, expected)
    experts = [module for module in loaded.model.modules() if isinstance(module, Experts)]
    assert experts
    for layer in experts:
        assert layer.layouts.keys() == {"gate_up_proj", "down_proj"}
        assert all(isinstance(layout, QuantizedWeight) for layouts in layer.layouts.values() for layout in layouts)


# ---- GGUF -------------------------------------------------------------------------------------------------------


Describe = Callable[[gguf.GGUFWriter, Any], None]
PERMUTED = {"llama", "mistral3", "smollm3", "granite", "granitemoe"}


def write_gguf(
    source: str, folder: Path, kind: str, quantization: str, describe: Describe | None = None
) -> PreTrainedModel:
    """Write a GGUF file with the package's own writer; returns the model stored in it. Its configuration is in the same
    folder, or in the metadata that `describe` adds."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    folder.mkdir(exist_ok=True)
    if describe is None:
        model.config.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{}")
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(folder / "model.gguf", kind)
    if describe is not None:
        describe(writer, model.config)
    block_type = gguf.GGMLQuantizationType[quantization]
    for name, parameter in model.named_parameters():
        for stored_name, part in parts_in_gguf(names, name, parameter.detach()):
            values, heads = part.clone(), 0
            if kind in PERMUTED and ("q_proj" in name or "k_proj" in name):
                heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
                # RoPE: rotated pairs of rows become adjacent.
                values = values.reshape(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
            if values.dim() == 1:
                # llama.cpp multiplies by the stored weight, Gemma's own code by the weight + 1.
                stored = values + 1 if kind.startswith("gemma") and "norm" in name else values
                writer.add_tensor(stored_name, stored.numpy())
                continue
            data = gguf.quants.quantize(values.numpy(), block_type)
            writer.add_tensor(stored_name, data, raw_dtype=block_type)
            back = torch.from_numpy(np.array(gguf.quants.dequantize(data, block_type)))
            if heads:
                back = back.reshape(heads, -1, 2, back.shape[1]).transpose(1, 2).reshape(back.shape)
            part.copy_(back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def parts_in_gguf(names: gguf.TensorNameMap, name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors of llama.cpp's converter for a weight, as views of it."""
    stem, _, leaf = name.rpartition(".")
    layer = re.search(r"\.layers\.(\d+)\.", name)
    ffn = f"blk.{layer[1]}.ffn" if layer else ""
    if leaf == "gate_up_proj":
        return [
            (f"{ffn}_{part}_exps.weight", rows) for part, rows in zip(("gate", "up"), weight.chunk(2, 1), strict=True)
        ]
    if leaf == "down_proj":
        return [(f"{ffn}_down_exps.weight", weight)]
    if stem.endswith("shared_mlp.input_linear"):
        return [
            (f"{ffn}_{part}_shexp.weight", rows) for part, rows in zip(("gate", "up"), weight.chunk(2), strict=True)
        ]
    if stem.endswith("shared_expert_gate"):
        return [(f"{ffn}_gate_inp_shexp.weight", weight[0])]
    if stem.endswith("router"):
        return [(f"{ffn}_gate_inp.weight", weight)]
    return [(f"{names.get_name(stem)}.{leaf}", weight)]


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gguf(base: str, tmp_path: Path, kind: str, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.engine.loading.formats.gguf._BLOCKS_AT_ONCE", 5)
    source = base if kind == "llama" else save(Qwen3Config(**SIZES, head_dim=16), tmp_path / "qwen3")
    expected = write_gguf(source, tmp_path / "packed", kind, quantization)
    loaded = load(tmp_path / "packed")
    native = quantization in ("Q8_0", "Q4_0")
    assert layouts(loaded).count(QuantizedWeight) == (15 if native else 0)
    assert_same_logits(loaded, expected)
    named = load(tmp_path / "packed", gguf_file=str(tmp_path / "packed" / "model.gguf"))
    assert_same_logits(named, expected)


def test_gguf_that_is_not_served(base: str, tmp_path: Path) -> None:
    write_gguf(base, tmp_path, "llama", "F16")
    file = tmp_path / "model.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00bloom"))
    with pytest.raises(StartupError, match=r"architecture 'bloom'; of GGUF files gemma, .* are served"):
        load(tmp_path)


def write_k_quants(source: str, folder: Path) -> PreTrainedModel:
    """Write a GGUF file whose up and down projections are Q4_K: blocks of 256 numbers, made by hand, since the package
    only reads them. Returns the model stored in it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_K
    for name, parameter in model.named_parameters():
        stem, _, leaf = name.rpartition(".")
        if not name.endswith(("up_proj.weight", "down_proj.weight")):
            values = parameter.detach().clone()
            if "q_proj" in name or "k_proj" in name:
                heads = 4 if "q_proj" in name else 2
                values = values.reshape(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", values.numpy())
            continue
        # A block: scale and scale of minima in float16, 12 bytes of 6-bit scales, 128 bytes of codes.
        blocks = rng.integers(0, 256, (parameter.shape[0], parameter.shape[1] // 256, 144), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(2e-3).tobytes(), np.uint8)
        blocks[..., 2:4] = np.frombuffer(np.float16(1e-2).tobytes(), np.uint8)
        data = blocks.reshape(parameter.shape[0], -1)
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", data, raw_dtype=kind)
        parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


K_QUANT_SIZES = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "head_dim": 16}


def test_k_quants_of_gguf(tmp_path: Path) -> None:
    source = save(LlamaConfig(**K_QUANT_SIZES), tmp_path / "a")
    model = write_k_quants(source, tmp_path / "b")
    assert_same_logits(load(tmp_path / "b"), model)


def test_rounding_is_what_the_tests_take_it_for() -> None:
    """The packers' own definition: no value is further from the original than half a step (and a little, since zero
    points are whole numbers and scales have 11 bits)."""
    weight = torch.randn(8, 64)
    for shuffled in (False, True):
        rounded: Rounded = round_to_nearest(weight, 4, 32, shuffled=shuffled)
        assert ((rounded.dense() - weight).abs() <= 1.1 * rounded.scales.float()[:, rounded.g_idx]).all()
