from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from fastserve.demo import demo_model_path
from fastserve.errors import StartupError
from fastserve.worker.model_source import ModelSource, default_name, find_model, resolve_model


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("fastserve-demo", "fastserve-demo"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/models/llama 2/", "llama 2"),
        ("C:\\models\\llama", "llama"),
    ],
)
def test_the_name_is_the_last_component(path: str, name: str) -> None:
    assert default_name(path) == name


def test_demo_and_folders(tmp_path: Path) -> None:
    assert resolve_model("fastserve-demo", "main") == Path(demo_model_path())
    with pytest.raises(StartupError, match=r"no config\.json"):
        resolve_model(str(tmp_path), "main")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), "main") == tmp_path
    with pytest.raises(StartupError, match="is a file"):
        resolve_model(str(tmp_path / "config.json"), "main")
    for missing in (str(tmp_path / "missing"), "./no/such/folder", "C:\\no\\such", "a/b/c"):
        with pytest.raises(StartupError, match="no such folder"):
            resolve_model(missing, "main")


class Hub:
    """Fake hub: a cache, and the files that can be downloaded."""

    def __init__(self, folder: Path, *, weights: str, cached: bool, online: bool) -> None:
        self.folder, self.weights, self.cached, self.online = folder, weights, cached, online
        self.calls: list[tuple[bool, bool]] = []

    def __call__(self, repository: str, *, revision: str, ignore_patterns: list[str], local_files_only: bool) -> str:
        assert (repository, revision) == ("org/model", "v2")
        with_bin = "*.bin" not in ignore_patterns
        self.calls.append((local_files_only, with_bin))
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only and not self.online:
            raise LocalEntryNotFoundError("no connection to the hub\nmore text")
        (self.folder / "config.json").write_text("{}")
        if self.weights.endswith(".safetensors") or with_bin:
            (self.folder / self.weights).write_text("")
        return str(self.folder)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"weights": "m.safetensors", "cached": True, "online": False}, [(True, False)]),
        ({"weights": "m.safetensors", "cached": False, "online": True}, [(True, False), (False, False)]),
        ({"weights": "m.bin", "cached": False, "online": True}, [(True, False), (False, False), (False, True)]),
    ],
)
def test_the_hub_is_asked_after_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], calls: list[tuple[bool, bool]]
) -> None:
    hub = Hub(tmp_path, **settings)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/model", "v2") == tmp_path
    assert hub.calls == calls


def test_an_unreachable_hub_is_a_startup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", Hub(tmp_path, weights="m.bin", cached=False, online=False)
    )
    with pytest.raises(StartupError, match=r"org/model.*no connection to the hub$"):
        resolve_model("org/model", "v2")


@pytest.mark.parametrize(
    ("index", "shard"),
    [("model.safetensors.index.json", "m-{}.safetensors"), ("pytorch_model.bin.index.json", "m-{}.bin")],
)
def test_an_interrupted_download_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str, shard: str
) -> None:
    first, second = (shard.format(i) for i in (1, 2))
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    (tmp_path / first).write_text("")
    hub = Hub(tmp_path, weights=first, cached=True, online=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(StartupError, match="no connection to the hub"):
        resolve_model("org/model", "v2")
    hub.online = True
    with pytest.raises(StartupError, match=f"has no {second}"):
        resolve_model("org/model", "v2")
    hub.weights = second
    assert resolve_model("org/model", "v2") == tmp_path
    hub.calls.clear()
    assert resolve_model("org/model", "v2") == tmp_path
    assert all(cached_only for cached_only, _ in hub.calls)


def test_a_cache_without_weights_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_config(*_: object, local_files_only: bool, **__: object) -> str:
        (tmp_path / "config.json").write_text("{}")
        if not local_files_only:
            (tmp_path / "model.safetensors").write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", only_config)
    assert resolve_model("org/model", "v2") == tmp_path
    assert (tmp_path / "model.safetensors").is_file()


def test_a_gguf_file_needs_its_configuration_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_model(str(file), "main") == ModelSource(tmp_path, gguf_file=file)
    assert find_model(str(tmp_path), "main") == ModelSource(tmp_path)


def test_a_gguf_file_is_known_by_its_first_bytes_too(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_model(str(blob), "main") == ModelSource(tmp_path, gguf_file=blob)
    blob.write_bytes(b"PK")
    with pytest.raises(StartupError, match="this is a file; give the model's folder"):
        find_model(str(blob), "main")


def test_an_adapter_leads_to_its_base_model(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert find_model(str(adapter), "main") == ModelSource(base, adapter_dir=adapter)
    with pytest.raises(StartupError, match=r"no config\.json, so it is not a model"):
        resolve_model(str(adapter), "main", flag="--speculative-model")
    settings.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(StartupError, match=r"The base model of the adapter \S+, \S+gone: there is no such folder"):
        find_model(str(adapter), "main")
    settings.write_text("{}")
    with pytest.raises(StartupError, match="does not name its base_model_name_or_path"):
        find_model(str(adapter), "main")


def test_random_weights_need_none_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached configuration is enough, and the hub is not asked."""
    asked = []

    def snapshot(repository: str, *, revision: str, ignore_patterns: list[str], local_files_only: bool) -> str:
        asked.append((local_files_only, "*.safetensors" in ignore_patterns and "*.bin" in ignore_patterns))
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_model("org/model", "main", dummy=True) == ModelSource(tmp_path)
    assert asked == [(True, True)]
