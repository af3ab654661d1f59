"""From the worker's command line to logits: each loading flag on a real file of its format."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers.dynamic_module_utils
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from fastserve import model_worker
from fastserve.config import WorkerConfig
from fastserve.distributed.gang import Gang
from fastserve.engine.client import EngineProcess
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError
from fastserve.options import parse_config
from fastserve.worker.model_source import find_model
from fastserve.worker.refusals import refuse_unavailable

from .packers import Pack, awq, round_to_nearest, write_packed
from .test_formats import SIZES, assert_same_logits, gptq_packer, layouts, save, write_gguf

LAYERS = 14
"""The model's linear layers, without the LM head."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(LlamaConfig(**SIZES), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def start(*argv: str) -> LoadedModel:
    """The model that a worker with this command line loads."""
    config = parse_config(WorkerConfig, ["--device", "cpu", *argv], "worker", {})
    refuse_unavailable(config)
    source = find_model(config.model_path, config.revision, dummy=config.dummy)
    return load_model(
        str(source.folder), config.device, config.dtype,
        trust_remote_code=config.trust_remote_code, progress=lambda *_: None,
        options=model_worker._weight_options(config, source),
    )  # fmt: skip


def packed_layers(loaded: LoadedModel) -> int:
    return layouts(loaded).count(QuantizedWeight)


def awq_packer(group: int) -> Pack:
    def pack(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_to_nearest(weight, 4, group)
        return awq(name, rounded), rounded.dense()

    return pack


# ---- 8 and 4 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("flag", "error"), [("--load-8bit", 0.1), ("--load-4bit", 0.8)])
def test_weights_in_fewer_bits(base: str, plain: PreTrainedModel, flag: str, error: float, dtype: str) -> None:
    loaded = start("--model-path", base, flag, "--dtype", dtype)
    assert loaded.dtype is getattr(torch, dtype)
    assert packed_layers(loaded) >= LAYERS
    name = "model.layers.0.mlp.up_proj.weight"
    assert (loaded.weights.get(name) - plain.get_parameter(name)).norm() <= error * plain.get_parameter(name).norm()


@pytest.mark.parametrize("flags", [[], ["--load-8bit"], ["--load-4bit"]])
def test_random_weights(base: str, tmp_path: Path, flags: list[str]) -> None:
    shutil.copy(Path(base) / "config.json", tmp_path)
    loaded = start("--model-path", str(tmp_path), "--dummy", *flags)
    assert packed_layers(loaded) >= (LAYERS if flags else 0)
    assert (packed_layers(loaded) > 0) == bool(flags)


def test_random_weights_of_a_quantized_model_are_reported_to_be_larger(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((Path(base) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert packed_layers(start("--model-path", str(tmp_path), "--dummy")) == 0
    assert "quantized (gptq); random ones are not" in caplog.text
    assert "--load-8bit and --load-4bit" in caplog.text


# ---- GPTQ and AWQ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_a_gptq_file_by_its_flags(base: str, tmp_path: Path, bits: int, order: bool) -> None:
    file = f"gptq_model-{bits}bit-32g.safetensors"
    expected = write_packed(base, tmp_path, gptq_packer(bits, 32, shuffled=order), None, file)
    flags = ["--gptq-ckpt", str(tmp_path / file), "--gptq-wbits", str(bits), "--gptq-groupsize", "32"]
    loaded = start("--model-path", base, *flags, *(["--gptq-act-order"] if order else []))
    assert packed_layers(loaded) == LAYERS
    assert_same_logits(loaded, expected)


def test_16_bits_say_nothing_about_gptq(base: str, plain: PreTrainedModel, tmp_path: Path) -> None:
    loaded = start("--model-path", base, "--gptq-wbits", "16", "--awq-wbits", "16")
    assert packed_layers(loaded) == 0
    assert_same_logits(loaded, plain)
    expected = write_packed(base, tmp_path, gptq_packer(4, 32), None, "quantized.pt")
    flags = ("--gptq-ckpt", str(tmp_path / "quantized.pt"), "--gptq-wbits", "16")
    assert_same_logits(start("--model-path", base, *flags), expected)


@pytest.mark.parametrize("beside", [False, True])
def test_awq_by_its_flags(base: str, tmp_path: Path, beside: bool) -> None:
    expected = write_packed(base, tmp_path, awq_packer(32), None, "awq_model-4bit.safetensors")
    flags = ["--awq-wbits", "4", "--awq-groupsize", "32"]
    if beside:
        flags += ["--awq-ckpt", str(tmp_path / "awq_model-4bit.safetensors")]
    loaded = start("--model-path", base if beside else str(tmp_path), *flags)
    assert packed_layers(loaded) == LAYERS
    assert_same_logits(loaded, expected)
    with pytest.raises(StartupError, match=r"^--awq-ckpt /gone: there is no such file or folder\.$"):
        start("--model-path", base, "--awq-ckpt", "/gone")


SETTINGS_FILES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "config.json": lambda settings: {"quantization_config": settings},
    "quantize_config.json": lambda settings: settings,
}


@pytest.mark.parametrize("file", list(SETTINGS_FILES))
@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_settings_beside_the_packed_weights_are_read(base: str, tmp_path: Path, file: str, key: str) -> None:
    """The model is another folder. Only the settings distinguish the two kinds of zero points, not the tensors."""
    expected = write_packed(base, tmp_path, gptq_packer(4, 32, v2=True), None)
    (tmp_path / file).write_text(json.dumps(SETTINGS_FILES[file]({"quant_method": "gptq", key: "gptq_v2"})))
    assert_same_logits(start("--model-path", base, "--gptq-ckpt", str(tmp_path), "--gptq-wbits", "4"), expected)


@pytest.mark.parametrize(
    ("file", "settings", "pack"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, gptq_packer(4, 32)),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, awq_packer(32)),
    ],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_settings_of_older_tools_need_no_flags(
    base: str, tmp_path: Path, file: str, settings: dict[str, Any], pack: Pack
) -> None:
    expected = write_packed(base, tmp_path, pack, None)
    (tmp_path / file).write_text(json.dumps(settings))
    assert_same_logits(start("--model-path", str(tmp_path)), expected)
    (tmp_path / file).write_text("[]")
    with pytest.raises(StartupError, match=rf"{file} cannot be read: it is no JSON object\.$"):
        start("--model-path", str(tmp_path))
    (tmp_path / file).write_text("{")
    with pytest.raises(StartupError, match=rf"{file} cannot be read: Expecting .*\.$"):
        start("--model-path", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--gptq-wbits", "4"],
            r"^--gptq-wbits: the settings beside .* are quantized by awq; leave the gptq flags out\.$",
        ),
        (
            ["--gptq-ckpt", "{}"],
            r"^--gptq-ckpt \S+: .* by awq; leave the gptq flags out and give that folder as the model\.$",
        ),
        (["--load-8bit"], r"^--load-8bit: the checkpoint is quantized already \(awq\); leave the flag out\.$"),
        (["--load-4bit"], r"^--load-4bit: the checkpoint is quantized already \(awq\); leave the flag out\.$"),
    ],
)
def test_flags_that_contradict_the_settings(base: str, tmp_path: Path, flags: list[str], words: str) -> None:
    write_packed(base, tmp_path, awq_packer(32), {"quant_method": "awq", "bits": 4})
    flags = [flag.format(tmp_path) for flag in flags]
    with pytest.raises(StartupError, match=words):
        start("--model-path", base if "--gptq-ckpt" in flags else str(tmp_path), *flags)


# ---- files of other kinds as the model --------------------------------------------------------------------------


def test_a_gguf_file_as_the_model(base: str, tmp_path: Path) -> None:
    expected = write_gguf(base, tmp_path, "llama", "Q4_0")
    file = str(tmp_path / "model.gguf")
    assert_same_logits(start("--model-path", file), expected)
    with pytest.raises(StartupError, match=rf"^--gptq-ckpt x excludes the GGUF file {file}: leave the gptq flags out"):
        start("--model-path", file, "--gptq-ckpt", "x")


GGUF_MODELS = {
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SIZES),
}


@pytest.mark.parametrize("kind", list(GGUF_MODELS))
def test_gguf_of_other_architectures(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(save(GGUF_MODELS[kind], tmp_path / "plain"), tmp_path / "packed", kind, "Q8_0")
    loaded = start("--model-path", str(tmp_path / "packed" / "model.gguf"))
    assert packed_layers(loaded) > 0
    assert_same_logits(loaded, expected)


def test_numbers_of_gguf_are_quantized_by_the_flag(base: str, tmp_path: Path) -> None:
    write_gguf(base, tmp_path, "llama", "F16")
    file = str(tmp_path / "model.gguf")
    assert packed_layers(start("--model-path", file)) == 0
    assert packed_layers(start("--model-path", file, "--load-8bit")) >= LAYERS


def test_an_adapter_as_the_model_in_8_bits(base: str, plain: PreTrainedModel, tmp_path: Path) -> None:
    """The merged weight is quantized, not its parts."""
    name = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(2, 64), torch.randn(96, 2)
    save_file(
        {f"base_model.model.{name}.lora_{key}.weight": tensor for key, tensor in (("A", a), ("B", b))},
        tmp_path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    expected = plain.get_parameter(f"{name}.weight") + b @ a
    for flags, error in (([], 1e-6), (["--load-8bit"], 0.01)):
        found = start("--model-path", str(tmp_path), *flags).weights.get(f"{name}.weight")
        assert (found - expected).norm() <= error * expected.norm()


# ---- names on the hub -------------------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The paths requested from the hub, which answers nothing."""
    asked: list[object] = []

    def refuse(*args: object, **_: object) -> NoReturn:
        asked.append(args)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.fixture
def hub_cache(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub's library writes it, with two versions of org/tiny: main is another model than v2, which is
    `base`."""
    repository = tmp_path / "hub" / "models--org--tiny"
    versions = {
        "main": ("a" * 40, save(LlamaConfig(**SIZES, rms_norm_eps=0.5), tmp_path / "other")),
        "v2": ("b" * 40, base),
    }
    for branch, (commit, model) in versions.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        for file in Path(model).iterdir():
            blob = repository / "blobs" / f"{commit[0]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repository.parent))
    return repository.parent


@pytest.mark.parametrize("revision", ["v2", "b" * 40])
def test_a_cached_name_needs_no_network(
    hub_cache: Path, network: list[object], plain: PreTrainedModel, tmp_path: Path, revision: str
) -> None:
    assert_same_logits(start("--model-path", "org/tiny", "--revision", revision), plain)
    first = start("--model-path", "org/tiny", "--load-8bit")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32)
    assert first.model.config.rms_norm_eps == other.config.rms_norm_eps == 0.5
    assert network == []


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_not_in_the_cache_is_a_sentence(
    hub_cache: Path, network: list[object], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (hub_cache / "models--org--tiny" / "snapshots" / ("b" * 40) / "model.safetensors").unlink()
    for name, revision in (("org/tiny", "v3"), ("org/tiny", "v2"), ("org/other", "main")):
        words = rf"^--model-path {name}: there is no such folder, .* of that name \(revision {revision}\): \S.*$"
        with pytest.raises(StartupError, match=words) as caught:
            start("--model-path", name, "--revision", revision)
        assert "\n" not in caught.value.message
    assert bool(network) != offline, "HF_HUB_OFFLINE forbids to ask, and nothing else does"


# ---- code that comes with a model -------------------------------------------------------------------------------

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "tiny-own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(base, tmp_path / "own_code"))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "tiny-own", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def test_code_of_a_model_runs_only_when_it_is_trusted(with_code: Path, plain: PreTrainedModel) -> None:
    words = r"^The model in \S+ comes with Python code of its own, which is not run unasked: .* --trust-remote-code if"
    with pytest.raises(StartupError, match=words) as caught:
        start("--model-path", str(with_code))
    assert "\n" not in caught.value.message
    assert not list(with_code.parent.rglob("ran"))
    loaded = start("--model-path", str(with_code), "--trust-remote-code")
    assert type(loaded.model).__name__ == "OwnForCausalLM"
    assert list(with_code.parent.rglob("ran"))
    assert_same_logits(loaded, plain)


def test_a_model_that_transformers_does_not_know_is_one_sentence(base: str, tmp_path: Path) -> None:
    config = json.loads((Path(base) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "fancy"}))
    with pytest.raises(StartupError, match=r"^The configuration in \S+ cannot be loaded: .*`fancy`.*\.$") as caught:
        start("--model-path", str(tmp_path))
    assert "\n" not in caught.value.message


# ---- devices ----------------------------------------------------------------------------------------------------


def test_flags_of_devices_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--gpus` is passed by the environment, which the engine's process inherits. For its effect see
    test_placement.py."""
    seen: list[tuple[str, EngineConfig]] = []

    def serve(config: WorkerConfig, gang: Gang | None) -> None:
        engine = model_worker._make_engine(config, find_model(config.model_path, config.revision), (), gang, {})
        assert isinstance(engine, EngineProcess)
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], engine._config))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(model_worker, "setup_logging", lambda *_: None)
    monkeypatch.setattr(model_worker, "_serve", serve)
    flags = "--device cuda --gpus 0,2 --num-gpus 2 --max-gpu-memory 13GiB --cpu-offloading --dtype float16"
    model_worker.main(flags.split())
    [(visible, config)] = seen
    assert visible == "0,2"
    assert (config.device, config.num_gpus, config.max_gpu_memory) == ("cuda", 2, "13GiB")
    assert (config.cpu_offloading, config.dtype) == (True, "float16")
