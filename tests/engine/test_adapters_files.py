"""The files of adapters of a batch, as releases of PEFT have written them: all give the same tiles."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.engine.core import EngineCore
from fastserve.errors import InvalidRequestError

from .conftest import TinyModels
from .test_adapters import load, make_adapter, manager, serve

Tensors = dict[str, torch.Tensor]
LAYERS = ("q_proj", "down_proj", "embed_tokens", "lm_head")
NAMES: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda name: name.replace("_A.w", "_A.default.w").replace("_B.w", "_B.default.w"),
    "with the adapter's name, embeddings too": lambda name: (
        f"{name}.default" if "embedding" in name else name.replace(".weight", ".default.weight")
    ),
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.fixture(scope="module")
def core(tiny_models: TinyModels) -> EngineCore:
    return serve(tiny_models.path("llama"), {})


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_models.path("llama"), tmp_path_factory.mktemp("files") / "x", 5, LAYERS)


def tiles_of(core: EngineCore, folder: Path) -> torch.Tensor:
    load(core, "x", folder, replace=True)
    adapter = manager(core).find("x")
    assert adapter is not None
    assert adapter.host is not None
    tiles: torch.Tensor = adapter.host[0].tiles
    return tiles.clone()


@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("rename", [*NAMES.values(), str], ids=[*NAMES, "as today"])
def test_older_names_and_files_are_the_same_adapter(
    core: EngineCore, folder: Path, tmp_path: Path, rename: Callable[[str], str], as_bin: bool
) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    shutil.copy(folder / "adapter_config.json", tmp_path)
    if as_bin:
        torch.save(renamed, tmp_path / "adapter_model.bin")
    else:
        save_file(renamed, tmp_path / "adapter_model.safetensors")
    assert torch.equal(tiles_of(core, tmp_path), tiles_of(core, folder))


def test_half_of_a_change_is_refused(core: EngineCore, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    shutil.copy(folder / "adapter_config.json", tmp_path)
    for lacking in ("lora_embedding_B", "lm_head.lora_A.weight"):
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(lacking)}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        with pytest.raises(InvalidRequestError, match="has only one of"):
            load(core, "half", tmp_path)
