"""Makes LoRA adapters with PEFT, and compares what is served with what PEFT merges."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fastserve.engine.loading.loader import LoadedModel
from fastserve.errors import StartupError

from .conftest import SHAPE, TinyModels, plain
from .test_formats import assert_same_logits, load

peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")

Lora = dict[str, Any]
ATTENTION = ["q_proj", "v_proj"]


class Adapters:
    """Makes adapters with random values for tiny models."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self._models = models
        self._folder = folder

    def base(self, name: str) -> str:
        """A model of conftest.py, or a Llama with biases ("biased") or a tied head ("tied")."""
        settings = {"biased": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}
        if name not in settings:
            return self._models.path(name)
        path = self._folder / name
        if not path.exists():
            torch.manual_seed(3)
            config = LlamaConfig(**{**SHAPE, **settings[name]})
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        return str(path)

    def make(self, base: str, folder: Path, lora: Lora, initial: Path | None = None) -> Path:
        """Save an adapter, as after some training. `initial`: a folder for the untrained adapter, from which PEFT then
        makes a plain one."""
        config = _quietly(lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        model = _quietly(lambda: peft.get_peft_model(plain(base), config))
        converted = {}
        if initial is not None:
            converted = {"path_initial_model_for_weight_conversion": str(initial)}
            init, config.init_lora_weights = config.init_lora_weights, True
            _quietly(lambda: model.save_pretrained(str(initial)))
            config.init_lora_weights = init
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        _quietly(lambda: model.save_pretrained(str(folder), **converted))
        return folder

    def save_again(self, base: str, folder: Path, target: Path) -> None:
        model = _quietly(lambda: peft.PeftModel.from_pretrained(plain(base), str(folder)))
        _quietly(lambda: model.save_pretrained(str(target), save_embedding_layers=False))  # else it asks the hub

    def unmerged(self, base: str, folder: Path | None) -> PreTrainedModel:
        """The base model with PEFT's adapter beside it, as it was trained."""
        if folder is None:
            return plain(base)
        model: PreTrainedModel = _quietly(lambda: peft.PeftModel.from_pretrained(plain(base), str(folder)))
        return model.eval()

    def merged(self, base: str, folder: Path) -> PreTrainedModel:
        """PEFT's result for a saved adapter."""
        model: PreTrainedModel = _quietly(
            lambda: peft.PeftModel.from_pretrained(plain(base), str(folder)).merge_and_unload()
        )
        return model.eval()


def _quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about ties and configurations
        return call()


def assert_merged(loaded: LoadedModel, expected: PreTrainedModel, base: str) -> None:
    """Weights and logits are equal, and the adapter does something."""
    state = expected.state_dict()
    unchanged = plain(base).state_dict()
    for name in loaded.weights.names():
        assert torch.allclose(loaded.weights.get(name), state[name], atol=1e-4, rtol=1e-4), name
    assert any(not torch.allclose(state[name], unchanged[name], atol=1e-3) for name in unchanged)
    assert_same_logits(loaded, expected, tolerance=1e-4)


def assert_refused(base: str, folder: Path, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        load(base, adapter_dir=str(folder))


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file)


def write(folder: Path, layers: dict[str, tuple[int, int]], **settings: Any) -> Path:
    """An adapter with random values for layers of given (out, in), under names that PEFT no longer writes."""
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for path, (out, width) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.2
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": "x", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
