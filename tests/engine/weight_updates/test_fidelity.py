"""After an update, an engine computes what one that was started on the new weights computes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastserve.engine.weight_messages import FromDisk
from fastserve.errors import FastserveError, InvalidRequestError
from tests.engine.conftest import CONFIGS, TinyModels

from .driver import Serving, as_bytes, other_weights, same_answers

FEW = ("llama", "qwen3_moe", "gpt2")
MANY = ("gemma2", "gpt_oss", "mixtral", "phi3", "gpt_neox", "opt", "starcoder2", "olmo2", "qwen2")


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MANY)])
def test_an_updated_engine_is_one_started_on_the_new_weights(
    tiny_models: TinyModels, tmp_path: Path, no_start_check: None, name: str
) -> None:
    new = other_weights(CONFIGS[name], tmp_path / "new")
    fresh = Serving(new)
    expected = fresh.answer_all()
    updated = Serving(tiny_models.path(name))
    old_answers, old_checksum = updated.answer_all(), updated.checksum()
    assert not same_answers(old_answers, expected)
    reply = updated.update(FromDisk(str(new)))
    assert (reply.success, reply.weight_version) == (True, "1")
    assert reply.tensors == len(checkpoint(new))
    assert same_answers(updated.answer_all(), expected)
    assert updated.checksum() == fresh.checksum() != old_checksum
    # Back, by the names of the checkpoint, in two parts that split layers.
    old = checkpoint(Path(tiny_models.path(name)))
    names = sorted(old, key=lambda one: zlib.crc32(one.encode()))
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        updated.update(as_bytes({one: old[one] for one in part}))
    assert updated.checksum() == old_checksum
    assert same_answers(updated.answer_all(), old_answers)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_weights_are_quantized_anew(
    tiny_models: TinyModels, tmp_path: Path, no_start_check: None, quantize: str
) -> None:
    from fastserve.engine.settings import WeightOptions

    new = other_weights(CONFIGS["llama"], tmp_path / "new")
    settings: dict[str, Any] = {"weights": WeightOptions(quantize=quantize)}
    fresh = Serving(new, **settings)
    updated = Serving(tiny_models.path("llama"), **settings)
    updated.update(FromDisk(str(new)))
    assert updated.checksum() == fresh.checksum()
    assert same_answers(updated.answer_all(), fresh.answer_all())


@pytest.fixture(scope="module")
def serving(tiny_models: TinyModels) -> Serving:
    return Serving(tiny_models.path("llama"))


def broken(folder: Path, name: str, tmp_path: Path) -> str:
    """A checkpoint that is wrong in one way."""
    from safetensors.torch import save_file

    tensors = checkpoint(folder)
    where = tmp_path / name
    where.mkdir()
    match name:
        case "lacks one":
            del tensors["model.layers.1.mlp.down_proj.weight"]
        case "another shape":
            tensors["model.norm.weight"] = torch.zeros(7)
        case "a bias":
            tensors["model.layers.1.mlp.down_proj.bias"] = torch.ones(48)
    save_file(tensors, where / "model.safetensors")
    if name == "cut off":
        whole = (where / "model.safetensors").read_bytes()
        (where / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if name == "quantized":
        (where / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    return str(where)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lacks one", "has no model.layers.1.mlp.down_proj.weight"),
        ("another shape", r"model.norm.weight has the shape \(48,\) in this model, not \(7,\)"),
        ("a bias", "down_proj.bias is not zero"),
        ("cut off", "is cut off"),
        ("quantized", "is quantized: give the unquantized one"),
        ("missing", "is no folder"),
    ],
)
def test_old_weights_stay_when_a_checkpoint_is_broken(
    serving: Serving, tiny_models: TinyModels, tmp_path: Path, name: str, words: str
) -> None:
    before = serving.checksum()
    path = "/nowhere" if name == "missing" else broken(Path(tiny_models.path("llama")), name, tmp_path)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        serving.update(FromDisk(path))
    assert caught.value.param in ("model_path", "shapes")
    assert serving.checksum() == before
    assert serving.core.stats.weight_version == "default"
    assert serving.ask([3, 4]).finish_reason == "length"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.nose.weight": torch.zeros(3)}, "no weight model.nose.weight"),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.bfloat16)}, "is float32 in this engine, not bfloat16"),
        ({"model.norm.weight": torch.zeros(2, 24)}, r"\(48,\) in this model, not \(2, 24\)"),
        ({}, "no tensors"),
    ],
)
def test_what_has_no_place_is_named(serving: Serving, tensors: dict[str, torch.Tensor], words: str) -> None:
    before = serving.checksum()
    with pytest.raises(InvalidRequestError, match=words):
        serving.update(as_bytes(tensors))
    assert serving.checksum() == before


def test_pickled_bytes_are_refused(serving: Serving) -> None:
    import pickle

    from fastserve.engine.weight_messages import FromBytes

    with pytest.raises(InvalidRequestError, match="pickled tensors are refused"):
        serving.update(FromBytes(pickle.dumps({"model.norm.weight": [1.0]})))


def test_weights_of_a_packed_checkpoint_are_refused_by_name(serving: Serving) -> None:
    receiver: Any = serving.core.updates._receiver
    receiver._fixed, before = "The weights are those of a gptq checkpoint", receiver._fixed
    try:
        with pytest.raises(FastserveError, match="gptq"):
            serving.update(FromDisk("/nowhere"))
    finally:
        receiver._fixed = before


def test_values_are_shown_by_names_of_the_checkpoint(tiny_models: TinyModels, no_start_check: None) -> None:
    serving = Serving(tiny_models.path("qwen3_moe"))
    tensors = checkpoint(Path(tiny_models.path("qwen3_moe")))
    checker = serving.core.updates.checker
    for name in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        shown = checker.values(name, 2)
        assert shown.values == tensors[name][:2].flatten().tolist()
        assert shown.shape == tuple(tensors[name].shape)
    with pytest.raises(FastserveError, match="no weight nothing") as caught:
        checker.values("nothing", 2)
    assert caught.value.status == 404


def test_a_checker_shows_which_weights_an_update_did_not_write(tiny_models: TinyModels, no_start_check: None) -> None:
    serving = Serving(tiny_models.path("llama"))
    whole = serving.checksum()
    checker = serving.core.updates.checker
    with pytest.raises(FastserveError, match="no snapshot"):
        checker.compare()
    checker.snapshot()
    assert checker.compare() == []
    serving.core.updates.randomize()
    assert len(checker.compare()) == len(serving.core.weights.names())
    tensors = checkpoint(Path(tiny_models.path("llama")))
    left = tensors.pop("model.layers.2.self_attn.k_proj.weight")
    serving.update(as_bytes(tensors))
    assert checker.compare() == ["model.layers.2.self_attn.k_proj.weight"]
    serving.update(as_bytes({"model.layers.2.self_attn.k_proj.weight": left}))
    assert checker.compare() == []
    assert serving.checksum() == whole
