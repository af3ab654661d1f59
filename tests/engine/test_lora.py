"""LoRA adapters as models. PEFT makes, saves, loads and merges each of them: the served weights and logits equal those
of its merge_and_unload."""

from __future__ import annotations

import json
import shutil
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

    def make(self, base: str, folder: Path, lora: Lora, change: Callable[[Any], None] | None = None) -> Path:
        """Save an adapter, as after some training. `change` is done to PEFT's model before."""
        model = self._quietly(
            lambda: peft.get_peft_model(plain(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora}))
        )
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if change is not None:
            change(model)
        self._quietly(lambda: model.save_pretrained(str(folder)))
        return folder

    def merged(self, base: str, folder: Path) -> PreTrainedModel:
        """PEFT's result for a saved adapter."""
        model: PreTrainedModel = self._quietly(
            lambda: peft.PeftModel.from_pretrained(plain(base), str(folder)).merge_and_unload()
        )
        return model.eval()

    @staticmethod
    def _quietly(call: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice about ties and configurations
            return call()


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tiny_models, tmp_path_factory.mktemp("adapters"))


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
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


KINDS: dict[str, tuple[str, Lora]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "by a regular expression": ("llama", {"target_modules": r".*\.(0|2)\..*(k|up)_proj"}),
    "some layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "one layer by its list": (
        "llama", {"target_modules": ATTENTION, "layers_to_transform": 1, "layers_pattern": "layers"}
    ),
    "without some modules": ("llama", {"target_modules": ATTENTION, "exclude_modules": r".*\.1\..*v_proj"}),
    "rank-stabilized": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns of rank and alpha": ("llama", {
        "target_modules": [*ATTENTION, "down_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"q_proj|v_proj": 3, r".*\.2\..*": 5},
    }),
    "gaussian": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
    "EVA": ("llama", {"target_modules": ATTENTION, "init_lora_weights": "eva"}),
    "MiCA": ("llama", {"target_modules": [*ATTENTION, "embed_tokens"], "init_lora_weights": "mica"}),
    "VeLoRA": ("llama", {"target_modules": ATTENTION, "velora_config": {}}),
    "PiSSA": ("llama", {"target_modules": [*ATTENTION, "up_proj"], "init_lora_weights": "pissa"}),
    "PiSSA of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    "PiSSA of a tied head": ("tied", {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", {"target_modules": [*ATTENTION, "down_proj"], "init_lora_weights": "olora", "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ATTENTION, "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "DoRA of an embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA of tied weights": ("tied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "DoRA, PiSSA": ("llama", {"target_modules": ATTENTION, "use_dora": True, "init_lora_weights": "pissa"}),
    "DoRA, ranks, biases": ("biased", {
        "target_modules": [*ATTENTION, "up_proj"], "use_dora": True, "rank_pattern": {"up_proj": 7}, "bias": "all",
    }),
    "biases": ("biased", {"target_modules": ATTENTION, "bias": "all"}),
    "biases of changed layers": ("biased", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "biases of Conv1D and norms": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "a bias of B": ("biased", {"target_modules": ATTENTION, "lora_bias": True, "use_rslora": True}),
    "a bias of B, and biases": ("biased", {"target_modules": ATTENTION, "lora_bias": True, "bias": "lora_only"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "a tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a tied head": ("tied", {"target_modules": ["lm_head"]}),
    "a tied head and its embedding": ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "kept ties": ("tied", {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}),
    "saved norms": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm", "layers.0.mlp"]}),
    "a saved embedding, tied": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "a saved head, tied": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "a saved head and embedding, tied": (
        "tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]}
    ),
    "saved, with kept ties": (
        "tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "a saved embedding, and a changed head": (
        "tied", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "use_dora": True}
    ),
    "rows of tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [2, 159]}),
    "rows of tokens, tied": ("tied", {"target_modules": ATTENTION, "trainable_token_indices": [2, 159, 77]}),
    "rows of embedding and head": (
        "llama", {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}}
    ),
    "other rows of embedding and head, tied": (
        "tied", {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}}
    ),
    "a parameter": ("llama", {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]}),
    "experts": ("qwen3_moe", {
        "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {r"experts\.down_proj": 3}, "alpha_pattern": {r"0\.mlp\.experts\.gate_up_proj": 2},
    }),
    "one weight of experts": ("mixtral", {"target_modules": [], "target_parameters": ["gate_up_proj"]}),
    "a router": ("mixtral", {"target_modules": ATTENTION, "target_parameters": ["gate.weight"]}),
    "experts with transposed weights": ("gpt_oss", {
        "target_modules": ATTENTION, "target_parameters": ["gate_up_proj", "down_proj", "down_proj_bias"], "bias": "all",
    }),
    "KaSA": ("llama", {"target_modules": [*ATTENTION, "up_proj"], "kasa_config": {}}),
    "block-diagonal": ("llama", {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False},
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_equals_what_peft_merges(adapters: Adapters, tmp_path: Path, kind: str) -> None:
    name, lora = KINDS[kind]
    base = adapters.base(name)
    folder = adapters.make(base, tmp_path / "adapter", lora)
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(base, folder), base)
