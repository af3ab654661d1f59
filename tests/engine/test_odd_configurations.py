"""Odd but legal files and ids: a model starts and answers as its own code does, or is refused with one sentence."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import architectures
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.loading import loader
from fastserve.engine.loading.loader import load_model
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

from .conftest import TinyModels, plain
from .test_formats import assert_same_logits, load

ODD: list[dict[str, Any]] = [
    {"pad_token_id": 10**6},
    {"pad_token_id": -1},
    {"pad_token_id": -(10**6)},
    {"bos_token_id": 10**6},
    {"eos_token_id": [2, 10**6]},
    {"dtype": "auto"},
    {"torch_dtype": "auto", "dtype": None},
    {"dtype": "torch.float32"},
    {"dtype": "nonsense"},
    {"architectures": None},
    {"rope_scaling": None},
    {"use_cache": False},
    {"return_dict": False},
    {"output_attentions": True},
    {"output_hidden_states": True},
    {"attention_dropout": 0.5},
    {"_attn_implementation": "flash_attention_2"},
    {"quantization_config": None},
    {"sliding_window": None},
    {"transformers_version": "99.0"},
    {"temperature": 0.5, "do_sample": True, "max_length": 7},
    {"unknown": {"field": [1]}},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pad_token_id": [0]}, "pad_token_id"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"max_position_embeddings": None}, "max_position_embeddings"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1 in"),
    ({"num_hidden_layers": 2**40}, f"num_hidden_layers is {2**40} in"),
    ({"num_attention_heads": 0}, "zero"),
    ({"hidden_act": "nonsense"}, "nonsense"),
    ({"model_type": "nonsense"}, "nonsense"),
    ({"vocab_size": 10**6}, "weight has the shape"),
    ({"rope_scaling": {"type": "nonsense", "factor": 2.0}, "rope_parameters": None}, "nonsense"),
]


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models.path("llama"), tmp_path / "model"))


def change(folder: Path, fields: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("fields", ODD, ids=str)
def test_odd_but_legal_configurations_are_served_rightly(folder: Path, fields: dict[str, Any]) -> None:
    expected = plain(folder)
    change(folder, fields)
    assert_same_logits(load(folder), expected)


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=str)
def test_impossible_configurations_are_refused_in_a_sentence(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, fields)
    with pytest.raises(StartupError, match=words) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5 in its config\.json\. Correct it"),
        ({"hidden_size": "a" * 5000}, r'hidden_size is "a{1,200}…'),
        ({"tie_word_embeddings": None}, r"tie_word_embeddings is null in its config\.json"),
        ({"hidden_act": "nonsense"}, r'hidden_act is "nonsense" in its config\.json'),
        ({"model_type": "nonsense"}, r'model_type is "nonsense" in its config\.json'),
    ],
    ids=str,
)
def test_refusals_begin_with_field_value_and_remedy(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, fields)
    with pytest.raises(StartupError, match=rf"cannot be loaded: {words}"):
        load(folder)


@pytest.mark.parametrize("value", [True, [2, False], 2.5, [[2]]], ids=str)
def test_end_tokens_that_are_no_ids_are_refused(folder: Path, value: Any) -> None:
    file = folder / "generation_config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | {"eos_token_id": value}))
    with pytest.raises(StartupError, match="eos_token_id"):
        load(folder)


MISSING = object()
ANY_VALUES: tuple[Any, ...] = (MISSING, None, "2", "text", 2.5, -1, 0, [1], {}, True)
NOT_TRIED = ("dtype", "pad_token_id")
"""Fields whose odd values transformers itself does not read; they are in ODD."""


def any_fields(folder: Path, share: float) -> Iterator[dict[str, Any]]:
    """The folder's configuration with one field changed, for a share of all fields and values."""
    config = json.loads((folder / "config.json").read_text())
    rng = random.Random(13)
    for field in [name for name in config if name not in NOT_TRIED]:
        for value in ANY_VALUES:
            if rng.random() < share:
                others = {name: other for name, other in config.items() if name != field}
                yield others if value is MISSING else others | {field: value}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("mixtral", 0.15),
        *(pytest.param(name, 1.0, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "deepseek_v3")),
    ],
)
def test_any_value_of_any_field_is_served_rightly_or_refused_in_a_sentence(
    name: str, share: float, tmp_path: Path
) -> None:
    architectures.save_model(architectures.small_config(name), tmp_path, 0)
    outcomes = {architectures.EXACT: 0, architectures.REFUSED: 0}
    for config in any_fields(tmp_path, share):
        (tmp_path / "config.json").write_text(json.dumps(config))
        row = architectures.Row(name, architectures.EXACT)
        try:
            architectures.compare(row, str(tmp_path), "float32")
        except StartupError as error:
            row.outcome, row.detail = architectures.REFUSED, str(error)
        assert row.outcome in outcomes, (config, row.detail)
        assert "\n" not in row.detail
        outcomes[row.outcome] += 1
    assert min(outcomes.values()) > 5


NO_SIZES: tuple[Any, ...] = (2**31, 2**62, 10**30, -(2**63), math.nan, math.inf)
SIZES_OF_MODELS = {
    "llama": (
        "hidden_size", "head_dim", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters.factor",
    ),
    "gpt2": ("n_embd", "n_positions", "n_inner", "n_head", "attn_pdrop", "layer_norm_epsilon"),
    "mixtral": ("num_local_experts", "num_experts_per_tok", "sliding_window"),
    "llava": ("text_config.hidden_size", "text_config.rope_parameters.factor"),
}  # fmt: skip


def with_value(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return config | {first: with_value(config.get(first) or {}, rest, value) if rest else value}


@pytest.mark.parametrize("name", SIZES_OF_MODELS)
def test_values_that_no_model_has_are_refused_by_name_before_memory_is_allocated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "build_skeleton", lambda *_, **__: pytest.fail("memory would be allocated"))
    own = json.loads(architectures.small_config(name).to_json_string(use_diff=False))
    for path in SIZES_OF_MODELS[name]:
        for value in NO_SIZES:
            (tmp_path / "config.json").write_text(json.dumps(with_value(own, path, value)))
            with pytest.raises(StartupError) as refusal:
                load(tmp_path)
            text = refusal.value.message
            leaf = path.removeprefix("text_config.")
            assert f"cannot be loaded: {leaf} is {json.dumps(value)} in its config.json, and must be a" in text
            assert text.endswith("Correct it, or download config.json again.")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_type", ["llama"]),
        ("model_type", 1e308),
        ("dtype", ["float32"]),
        ("dtype", math.nan),
        ("rope_parameters.rope_type", 7),
        ("rope_parameters.rope_type", nested(300)),
        ("rope_parameters.rope_theta", "x" * 10**5),
        ("rope_parameters.rope_theta", [1e4]),
        ("rope_parameters.rope_theta", {"a": 1e4}),
        ("rope_parameters.full_attention", "x"),
        ("hidden_act", "x" * 10**5),
        ("initializer_range", 1e308),
        ("rope_parameters.rope_theta", 1e-320),
        ("rope_parameters.rope_theta", 10**30),
        ("rope_parameters.rope_theta", math.nan),
        ("hidden_size", -64),
        ("rms_norm_eps", -1e-5),
        ("hidden_size", nested(300)),
        ("hidden_size", "x" * 10**5),
        ("num_attention_heads", 1_000_001),
        ("hidden_size", 1_000_001),
        ("eos_token_id", {"a": nested(300)}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_of_the_wrong_kind_are_refused_by_name_in_a_short_sentence(folder: Path, path: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(with_value(config, path, value)))
    with pytest.raises(StartupError, match=rf"cannot be loaded: {re.escape(path)} is ") as refusal:
        load(folder)
    assert len(refusal.value.message) < 1500
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"training_tokens": 10**15, "loss": math.nan, "n": -(10**9)},
        {"bos_token_id": 2**40, "max_length": 10**30},
        {"rope_theta": 10**11},
    ],
    ids=str,
)
def test_large_values_without_effect_are_no_hindrance(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, fields)
    load(folder)


def test_a_lack_of_memory_is_put_down_to_the_largest_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 549755813888 bytes.")

    monkeypatch.setattr(loader, "build_skeleton", fail)
    change(folder, {"intermediate_size": 2**23})
    with pytest.raises(
        StartupError, match=f"cannot be loaded: intermediate_size is {2**23} in its config.json. Correct"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_the_dtype_of_a_configuration_is_read_in_both_forms(folder: Path, name: str) -> None:
    change(folder, {"dtype": name})
    loaded = load_model(str(folder), "cpu", None, trust_remote_code=False, progress=lambda *_: None)
    assert loaded.dtype is torch.bfloat16


def test_a_token_id_beyond_the_vocabulary_ends_its_own_request_alone(tiny_models: TinyModels) -> None:
    core = build_core(EngineConfig(model_dir=tiny_models.path("llama"), device="cpu"), lambda *_: None)
    beyond = core.info.vocab_size
    good = SamplingParams(max_tokens=4, temperature=0.0)
    wrong = {
        "prompt": EngineRequest("prompt", [3, beyond], good),
        "negative": EngineRequest("negative", [-1, 3], good),
        "emitted": EngineRequest("emitted", [3], good, emitted_ids=[beyond]),
        "stop": EngineRequest("stop", [3], SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(beyond,))),
        "bias": EngineRequest("bias", [3], SamplingParams(max_tokens=4, logit_bias={beyond: 1.0})),
    }
    assert core.add(EngineRequest("good", [3, beyond - 1], good)) is None
    for name, request in wrong.items():
        refused = core.add(request)
        assert refused is not None
        assert (refused.request_id, refused.finish_reason) == (name, "error")
        assert str(-1 if name == "negative" else beyond) in str(refused.error)
    found: list[int] = []
    while core.has_work:
        for output in core.step():
            assert output.request_id == "good"
            found += output.token_ids
    assert len(found) == 4
