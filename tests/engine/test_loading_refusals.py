"""Refused checkpoints: one sentence each, with tensor, file and remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from fastserve.engine import build
from fastserve.engine.contract import FusedLayers
from fastserve.engine.loading import checkpoint, placement
from fastserve.engine.loading import loader as loading
from fastserve.engine.loading.loader import load_model
from fastserve.engine.settings import EngineConfig, PackedCheckpoint
from fastserve.errors import StartupError

from .conftest import TinyModels
from .packers import Tensors, awq, packed_integers, round_to_nearest, write_packed
from .test_formats import SIZES, compressed, gptq_packer, load, save, write_gguf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base: str, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def refused(folder: Path | str, words: str, **options: Any) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        load(folder, **options)
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")


# ---- safetensors ------------------------------------------------------------------------------------------------


def change_header(folder: Path, name: str, **changes: Any) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_dtype_that_is_not_served(folder: Path) -> None:
    change_header(folder, "model.norm.weight", dtype="F4")
    refused(
        folder, r"model\.safetensors: the tensor model\.norm\.weight has the dtype F4, .* use a checkpoint in 8, 16"
    )


def test_a_size_that_contradicts_the_shape(folder: Path) -> None:
    change_header(folder, "model.norm.weight", shape=[65])
    refused(
        folder, r"model\.safetensors is broken: the tensor model\.norm\.weight of shape \(65,\) has 256 bytes\. Down"
    )


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "model.safetensors"
    right = checkpoint._open_safetensors

    def cut_after(path: Path) -> dict[str, checkpoint.StoredTensor]:
        found = right(path)
        file.write_bytes(file.read_bytes()[:-100])
        return found

    monkeypatch.setattr(checkpoint, "_open_safetensors", cut_after)
    refused(folder, r"model\.safetensors was changed while the model was loaded")


def other_weights(folder: Path, other: Path) -> None:
    """Other weights of the same names and shapes, as by an upload that is renamed into place."""
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, other / "new.safetensors")
    os.replace(other / "new.safetensors", folder / "model.safetensors")


def written_in_place(folder: Path, other: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"abcd")


def other_folder(folder: Path, other: Path) -> None:
    folder.rename(other / "old")
    shutil.copytree(other / "old", folder)


def other_config(folder: Path, other: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def removed(folder: Path, other: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [other_weights, written_in_place, other_folder, other_config, removed])
@pytest.mark.parametrize("late", [False, True])
def test_files_that_are_replaced_while_they_are_read(
    folder: Path, tmp_path: Path, change: Callable[[Path, Path], None], late: bool
) -> None:
    """Before the first weight is read, or after the last one."""

    def progress(_: str, done: int, total: int) -> None:
        if done == (total if late else 0):
            (tmp_path / "other").mkdir()
            change(folder, tmp_path / "other")

    with pytest.raises(StartupError, match=r"(model\.safetensors|config\.json) was changed while the model was loaded"):
        load_model(str(folder), "cpu", "float32", trust_remote_code=False, progress=progress)


def test_other_files_may_change_while_a_model_is_loaded(folder: Path) -> None:
    def progress(_: str, done: int, total: int) -> None:
        (folder / "trainer_state.json").write_text(str(done))
        (folder / "README.md").write_text(str(done))

    load_model(str(folder), "cpu", "float32", trust_remote_code=False, progress=progress)


NESTED = "[" * 100_000
"""JSON of more levels than Python reads."""


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "quantize_config.json"])
def test_settings_that_are_nested_too_deeply(folder: Path, name: str) -> None:
    (folder / name).write_text(NESTED)
    refused(folder, "recursion")


def test_a_header_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(NESTED)) + NESTED.encode())
    refused(folder, r"model\.safetensors cannot be loaded: its header is broken")


def test_an_adapter_whose_settings_are_nested_too_deeply(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(NESTED)
    refused(folder, "cannot be read as the settings of a LoRA adapter", adapter_dir=str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', NESTED], ids=lambda text: text[:20])
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(
        folder, r"model\.safetensors\.index\.json cannot be read as an index of shards \(.*\)\. Download it again\.$"
    )


def test_the_index_of_a_variant_does_not_come_first(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    where = dict.fromkeys(state, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "model.fp16.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "not-there.safetensors"}})
    )
    assert torch.equal(load(folder).weights.get("model.norm.weight"), state["model.norm.weight"])


def test_one_weight_under_two_names(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "norm.weight": torch.ones(64)}, folder / "model.safetensors")
    refused(folder, r"model\.safetensors: \S*norm\.weight and \S*norm\.weight are both model\.norm\.weight\.$")


# ---- pickles ----------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it would call a function."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return exec, (f"open({str(self.file)!r}, 'w')",)


@pytest.mark.parametrize("suffix", ["bin", "pt"])
def test_code_in_a_pickle_is_named_and_not_run(folder: Path, suffix: str) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "extra": Trap(folder / "sprung")}, folder / f"pytorch_model.{suffix}")
    refused(
        folder, rf"pytorch_model\.{suffix} is refused: .* a call of code \(\S*exec\), .* Use the model's safetensors"
    )
    flags = PackedCheckpoint("gptq", str(folder / f"pytorch_model.{suffix}"))
    refused(folder, r"is refused: .* a call of code", packed=flags)
    assert not (folder / "sprung").exists()


def test_a_pickle_without_a_table(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin holds no table of tensors, but list: use a file of the model's weights\.$")
    (folder / "pytorch_model.bin").write_bytes(b"<html>not found</html>")
    refused(folder, r"pytorch_model\.bin cannot be loaded: it is broken, cut off, or no file of weights\. Download")


def test_a_pickled_shard_that_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    where = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save({}, folder / where["a"])
    refused(folder, r"lacks pytorch_model-00002-of-00002\.bin, which pytorch_model\.bin\.index\.json names: download")


# ---- packed formats ---------------------------------------------------------------------------------------------


def pack_awq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rounded = round_to_nearest(weight, 4, 32)
    return awq(name, rounded), rounded.dense()


@pytest.mark.parametrize("name", ["gptq_p", "marlin"])
def test_gptq_in_another_layout(base: str, tmp_path: Path, name: str) -> None:
    """Other formats can have the same shapes with another meaning of the numbers."""
    settings = {"quant_method": "gptq", "bits": 4, "format": name}
    write_packed(base, tmp_path, gptq_packer(4, 32), settings)
    refused(tmp_path, rf"^GPTQ checkpoints of the format {name} are not served: gptq and gptq_v2 are\. Save it in one")


def test_awq_that_is_not_served(base: str, tmp_path: Path) -> None:
    write_packed(base, tmp_path, pack_awq, {"quant_method": "awq", "bits": 8})
    refused(tmp_path, r"^AWQ with 8 bits is not served: 4 bits are\. Use such a checkpoint, or .* --load-8bit\.$")
    refused(base, r"^AWQ: no tensor .* ends in \.qweight.*; leave the awq flags out\.$", packed=PackedCheckpoint("awq"))
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.up_proj.qzeros"] = torch.zeros(3, 12, dtype=torch.int32)
    save_file(state, tmp_path / "model.safetensors")
    words = r"model\.safetensors: the shapes of model\.layers\.0\.mlp\.up_proj are not those of AWQ with 4 bits"
    (tmp_path / "config.json").write_bytes((Path(base) / "config.json").read_bytes())
    refused(tmp_path, words, packed=PackedCheckpoint("awq"))


def test_packed_integers_of_unknown_width(base: str, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rounded = round_to_nearest(weight, 4, 32)
        return packed_integers(name, rounded, 4), rounded.dense()

    write_packed(base, tmp_path, pack, compressed("pack-quantized", num_bits=5))
    refused(
        tmp_path, r"model\.safetensors: \S+ is packed, and config_groups .* widths of \[5\] bits; one of 2, 4 and 8"
    )


# ---- GGUF -------------------------------------------------------------------------------------------------------


def test_gguf_that_is_cut_off_names_the_tensor(base: str, tmp_path: Path) -> None:
    write_gguf(base, tmp_path, "llama", "Q8_0")
    file = tmp_path / "model.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    refused(tmp_path, r"model\.gguf is cut off in the tensor output\.weight: it ends after \d+ of .* Download it again")
    file.write_bytes(whole[:300])
    refused(tmp_path, r"model\.gguf cannot be read as a GGUF file: it is broken or cut off .* Download it again")


def test_gguf_in_parts_and_in_company(base: str, tmp_path: Path) -> None:
    write_gguf(base, tmp_path, "llama", "F16")
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    refused(tmp_path, r"holds 2 GGUF files: name one, such as --model-path \S+model\.gguf")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = str(tmp_path / "part.gguf")
    refused(tmp_path, r"part\.gguf is one of 3 parts of a model, and its name does not say which", gguf_file=file)


# ---- adapters ---------------------------------------------------------------------------------------------------

UP = "base_model.model.model.layers.0.mlp.up_proj"


def adapter(folder: Path, tensors: Tensors) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, r"has an adapter_config\.json, but no adapter_model\.safetensors\. Download it again\.$"),
        ({f"{UP}.lora_A.weight": (2, 64)}, r"up_proj has only one of lora_A and lora_B\. Save the adapter again\.$"),
        (
            {f"{UP}.lora_magnitude_vector": (96,)},
            r"is no part of a LoRA adapter .* Merge it with PEFT's merge_and_unload",
        ),
        (
            {f"{UP}.lora_A.weight": (2, 48), f"{UP}.lora_B.weight": (96, 2)},
            r"adapter_model\.safetensors: \S+up_proj\.lora_A\.weight and .* change a weight of shape \(96, 48\), and "
            r"model\.layers\.0\.mlp\.up_proj\.weight of the base model has the shape \(96, 64\)",
        ),
    ],
    ids=["none", "half", "magnitude", "shape"],
)
def test_adapters_that_cannot_be_merged(base: str, tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    made = {name: torch.ones(shape) for name, shape in tensors.items()}
    refused(base, words, adapter_dir=adapter(tmp_path / "adapter", made))


def test_an_adapter_of_a_quantized_model(base: str, tmp_path: Path) -> None:
    write_packed(base, tmp_path / "packed", gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4})
    tensors = {f"{UP}.lora_A.weight": torch.ones(2, 64), f"{UP}.lora_B.weight": torch.ones(96, 2)}
    words = r"adapter cannot be added to \S+up_proj\.weight, which is quantized; use .* --load-8bit or --load-4bit"
    refused(tmp_path / "packed", words, adapter_dir=adapter(tmp_path / "adapter", tensors))


def test_weights_that_an_adapter_replaces(base: str, tmp_path: Path) -> None:
    """`modules_to_save`: whole weights besides the low-rank deltas."""
    norm, head = torch.full((64,), 3.0), torch.randn(160, 64)
    tensors = {
        "base_model.model.model.norm.weight": norm, "base_model.model.lm_head.modules_to_save.default.weight": head
    }  # fmt: skip
    loaded = load(base, adapter_dir=adapter(tmp_path / "adapter", tensors))
    assert torch.equal(loaded.weights.get("model.norm.weight"), norm)
    assert torch.equal(loaded.weights.get("lm_head.weight"), head)


# ---- disk -------------------------------------------------------------------------------------------------------


def test_a_folder_for_the_rest_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    words = r"^--cpu-offloading: the folder for what fits neither .* cannot be made .*; set XDG_CACHE_HOME"
    with pytest.raises(StartupError, match=words):
        placement._offload_folder()


# ---- experts ----------------------------------------------------------------------------------------------------


def test_an_expert_of_another_shape(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models.path("qwen3_moe"), tmp_path / "model"))
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    save_file({**state, name: state[name][:, :-1].contiguous()}, file)
    refused(
        folder,
        r"model\.safetensors: model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight has the shape \(48, 31\), and "
        r"model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight has \(48, 32\)\.",
    )


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"gone\.safetensors: there is no such file\.$"):
        checkpoint.open_file(tmp_path / "gone.safetensors")


def test_a_model_without_attention(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown kind of model, which never calls the attention function."""
    monkeypatch.setattr(loading, "fuse_attention", lambda *_: FusedLayers("attention", 0, 0))
    config = EngineConfig(model_dir=base, device="cpu", dtype="float32", max_num_seqs=4, max_total_tokens=64)
    with pytest.raises(StartupError, match=r"^LlamaForCausalLM cannot be served: it has no attention that can be"):
        build.build_core(config, lambda *_: None)
