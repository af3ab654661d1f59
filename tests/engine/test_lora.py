"""LoRA adapters as models. PEFT makes, saves, loads and merges each of them: the served weights and logits equal those
of its merge_and_unload."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, SiglipVisionConfig

from fastserve.errors import StartupError

from .adapters import ATTENTION, Adapters, Lora, assert_merged, assert_refused, write
from .conftest import CONFIGS, TinyModels, plain
from .packers import write_packed
from .test_formats import SIZES, assert_same_logits, gptq_packer, load, save


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tiny_models, tmp_path_factory.mktemp("adapters"))


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
        "target_modules": ATTENTION, "bias": "all",
        "target_parameters": ["gate_up_proj", "down_proj", "down_proj_bias"],
    }),
    "KaSA": ("llama", {"target_modules": [*ATTENTION, "up_proj"], "kasa_config": {}}),
    "block-diagonal": ("llama", {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "use_bdlora": {
            "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False
        },
    }),
}  # fmt: skip


SLOW = (
    "all linear layers", "one layer by its list", "gaussian", "orthogonal", "EVA", "VeLoRA", "PiSSA of Conv1D",
    "DoRA of an embedding", "DoRA, PiSSA", "biases of changed layers", "a bias of B, and biases", "an embedding",
    "a tied head", "a saved head, tied", "rows of embedding and head", "a parameter", "one weight of experts",
)  # fmt: skip
"""Kinds whose code others run too."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_every_kind_equals_what_peft_merges(adapters: Adapters, tmp_path: Path, kind: str) -> None:
    name, lora = KINDS[kind]
    base = adapters.base(name)
    folder = adapters.make(base, tmp_path / "adapter", lora)
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(base, folder), base)


# ---- older files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "experts", "router", "widths"),
    [
        (
            "mixtral",
            "block_sparse_moe.experts",
            "block_sparse_moe.gate",
            {"w1": (96, 48), "w3": (96, 48), "w2": (48, 96)},
        ),
        ("qwen3_moe", "mlp.experts", "mlp.gate", {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}),
    ],
)
def test_experts_that_were_trained_one_by_one(
    adapters: Adapters, tmp_path: Path, name: str, experts: str, router: str, widths: dict[str, tuple[int, int]]
) -> None:
    """As with transformers 4; PEFT joins their matrices, and so are they saved again."""
    base = adapters.base(name)
    layers = {
        f"model.layers.{layer}.{experts}.{expert}.{leaf}": shape
        for layer in range(3) for expert in range(4) for leaf, shape in widths.items()
    }  # fmt: skip
    layers |= {f"model.layers.{layer}.{router}": (4, 48) for layer in range(3)}
    folder = write(tmp_path / "adapter", layers, target_modules=[*widths, "gate"])
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(base, folder), base)
    adapters.save_again(base, folder, tmp_path / "joined")
    assert_merged(load(base, adapter_dir=str(tmp_path / "joined")), adapters.merged(base, folder), base)


@pytest.fixture(scope="module")
def composite(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a language model inside, whose weights are stored under the names of transformers 4."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = CONFIGS["gemma3"].to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    folder = tmp_path_factory.mktemp("composite")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    assert any(name.startswith("language_model.model") for name in load_file(folder / "model.safetensors"))
    return str(folder)


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_composites_under_old_and_new_names(adapters: Adapters, composite: str, tmp_path: Path, prefix: str) -> None:
    layers = {f"{prefix}.layers.{layer}.self_attn.q_proj": (48, 48) for layer in range(3)}
    fields = {"target_modules": r".*language_model.*q_proj", "alpha_pattern": {"layers.1.self_attn.q_proj": 1}}
    folder = write(tmp_path / "adapter", layers, **fields)
    assert_merged(load(composite, adapter_dir=str(folder)), adapters.merged(composite, folder), composite)


def test_a_saved_embedding_of_a_composite(adapters: Adapters, composite: str, tmp_path: Path) -> None:
    lora = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["embed_tokens"]}
    folder = adapters.make(composite, tmp_path / "adapter", lora)
    assert_merged(load(composite, adapter_dir=str(folder)), adapters.merged(composite, folder), composite)


def test_layouts_of_old_releases(adapters: Adapters, tmp_path: Path) -> None:
    """The adapter's name in the tensors' names, biases without `base_layer`, saved modules with their wrapper, fields
    of those days and none of today's, and a pickled file."""
    base = adapters.base("biased")
    lora = {"target_modules": ATTENTION, "bias": "lora_only", "modules_to_save": ["lm_head"], "use_dora": True}
    folder = adapters.make(base, tmp_path / "adapter", lora)
    expected = adapters.merged(base, folder)
    old = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = name.replace(".lora_A.", ".lora_A.default.").replace(
            "lora_magnitude_vector", "lora_magnitude_vector.default"
        )
        name = name.replace(".base_layer.bias", ".bias").replace("lm_head.", "lm_head.modules_to_save.default.")
        old[name] = tensor
    (folder / "adapter_model.safetensors").unlink()
    torch.save(old, folder / "adapter_model.bin")
    fields = json.loads((folder / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_dora")
    old_fields = {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": False, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps({name: fields[name] for name in kept} | old_fields))
    assert_merged(load(base, adapter_dir=str(folder)), expected, base)


@pytest.mark.parametrize(
    "init", ["pissa_niter_4", *(pytest.param(i, marks=pytest.mark.slow) for i in ("pissa", "olora"))]
)
def test_adapters_that_were_converted_to_plain_ones(adapters: Adapters, tmp_path: Path, init: str) -> None:
    """PEFT's remedy for adapters that change their base model, which messages about some kinds recommend."""
    base = adapters.base("llama")
    lora = {"target_modules": ATTENTION, "init_lora_weights": init}
    folder = adapters.make(base, tmp_path / "adapter", lora, initial=tmp_path / "begin")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(base, folder), base)


# ---- dtypes and formats -----------------------------------------------------------------------------------------


def test_a_base_in_bfloat16_is_not_rounded_again(adapters: Adapters, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    plain(adapters.base("tied")).to(torch.bfloat16).save_pretrained(base)
    lora = {"target_modules": [*ATTENTION, "gate_proj"], "use_dora": True, "modules_to_save": ["embed_tokens"]}
    folder = adapters.make(base, tmp_path / "adapter", lora)
    expected = adapters.merged(base, folder)
    assert_merged(load(base, adapter_dir=str(folder)), expected, base)
    served = load(base, "bfloat16", adapter_dir=str(folder))
    state = expected.state_dict()
    assert all(torch.equal(served.weights.get(name), state[name].bfloat16()) for name in served.weights.names())


def test_whole_weights_beside_quantized_ones(adapters: Adapters, tmp_path: Path) -> None:
    """As after training on a quantized model: what the adapter does not touch stays quantized."""
    base = save(LlamaConfig(**SIZES), tmp_path / "base")
    rounded = write_packed(base, tmp_path / "packed", gptq_packer(4, 32), {"quant_method": "gptq", "bits": 4})
    lora = {"target_modules": ["lm_head"], "modules_to_save": ["norm", "embed_tokens"]}
    folder = adapters.make(base, tmp_path / "adapter", lora)
    rounded.save_pretrained(tmp_path / "rounded")
    expected = adapters.merged(str(tmp_path / "rounded"), folder)
    assert_same_logits(load(tmp_path / "packed", adapter_dir=str(folder)), expected)
    folder = adapters.make(base, tmp_path / "other", {"target_modules": ["q_proj"]})
    assert_refused(
        str(tmp_path / "packed"), folder, r"q_proj\.weight, which is quantized; use the unquantized base model"
    )


@pytest.mark.parametrize("differs", [False, True])
def test_tied_weights_that_the_checkpoint_has_twice(adapters: Adapters, tmp_path: Path, differs: bool) -> None:
    """If the two differ, transformers does not tie them, whatever config.json says."""
    base = tmp_path / "base"
    shutil.copytree(adapters.base("tied"), base)
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + (0.5 if differs else 0)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    folder = adapters.make(str(base), tmp_path / "adapter", {"target_modules": ["lm_head"]})
    assert_merged(load(base, adapter_dir=str(folder)), adapters.merged(str(base), folder), str(base))


# ---- combinations -----------------------------------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "target_modules": [
        ATTENTION,
        ["q_proj", "down_proj", "lm_head"],
        ["embed_tokens", "o_proj"],
        r".*\.[02]\..*_proj",
        "all-linear",
    ],
    "init_lora_weights": [True, False, "pissa", "olora", "gaussian", "mica"],
    "use_rslora": [False, True],
    "use_dora": [False, True],
    "lora_bias": [False, True],
    "bias": ["none", "all", "lora_only"],
    "rank_pattern": [{}, {"q_proj": 2, r"layers\.1\..*": 6}],
    "alpha_pattern": [{}, {"o_proj|lm_head": 3}],
    "modules_to_save": [None, ["norm"], ["lm_head"], ["embed_tokens"]],
    "trainable_token_indices": [None, [3, 9]],
    "exclude_modules": [None, ["layers.1.self_attn.q_proj"]],
    "ensure_weight_tying": [False, False, True],
}


@pytest.mark.slow
@settings(max_examples=60)
@given(
    base=st.sampled_from(["biased", "tied"]),
    lora=st.fixed_dictionaries({n: st.sampled_from(c) for n, c in CHOICES.items()}),
)
def test_combinations_equal_what_peft_merges(adapters: Adapters, base: str, lora: Lora) -> None:
    """Whatever PEFT can merge is merged the same, or refused."""
    path = adapters.base(base)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            adapters.make(path, folder, lora)
            expected = adapters.merged(path, folder)
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError):
            reject()  # PEFT cannot make or merge it
        try:
            loaded = load(path, adapter_dir=str(folder))
        except StartupError:
            if lora["ensure_weight_tying"] or lora["trainable_token_indices"]:
                return
            raise
        assert_merged(loaded, expected, path)
