from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastserve.errors import StartupError
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.slow_tokenizer import SlowTokenizer
from tests.text import tiny_tokenizers as tiny


def test_special_tokens_and_end_tokens(save: tiny.Save) -> None:
    folder = save(
        tiny.sentencepiece(),
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        config={"eos_token_id": 9},
        generation_config={"eos_token_id": [4, 2]},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_ids == (4, 2)
    assert tokenizer.encode("the", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).eos_token_ids == (9, 2)
    assert tokenizer.vocab_size == 1 + max(tiny.sentencepiece().get_vocab().values())


def test_bos_is_the_token_that_the_post_processor_puts_first(save: tiny.Save) -> None:
    assert load_tokenizer(save(tiny.sentencepiece())).bos_text == "<s>"
    config = {"bos_token": "<s>", "add_bos_token": True}
    assert load_tokenizer(save(tiny.byte_level(), tokenizer_config=config)).bos_text is None, "as in transformers"


def test_padding_and_truncation_of_the_file_are_off(save: tiny.Save) -> None:
    raw = tiny.byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=64)
    tokenizer = load_tokenizer(save(raw))
    assert 3 < len(tokenizer.encode("hello world, how are you", add_special_tokens=False)) < 64


async def test_long_texts_are_encoded_off_the_loop(save: tiny.Save) -> None:
    tokenizer = load_tokenizer(save(tiny.byte_level()))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    ids = await asyncio.to_thread(tokenizer.encode, "hello world " * 60_000, add_special_tokens=False)
    ticking.cancel()
    assert tokenizer.decode(ids) == "hello world " * 60_000
    assert ticks > 3


def test_an_invalid_folder_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartupError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_settings_that_are_nested_too_deeply_are_a_startup_error(tmp_path: Path) -> None:
    tiny.word_piece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(StartupError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)


def with_part(name: str, value: Any) -> dict[str, Any]:
    return {**json.loads(tiny.word_piece().to_str()), name: value}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (with_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "PreTrainedTokenizerFast"),
        (with_part("normalizer", {"type": "Precompiled", "precompiled_charsmap": 0}), "PreTrainedTokenizerFast"),
        (json.loads(tiny.byte_level().to_str()), "GemmaTokenizer"),  # it has not the token for unknown ones
    ],
)
def test_a_tokenizer_whose_parts_do_not_fit_is_a_startup_error(
    tmp_path: Path, content: dict[str, Any], name: str
) -> None:
    """Also where the library panics, which is no exception like others."""
    files = {"tokenizer": content, "tokenizer_config": {"tokenizer_class": name}, "config": {"model_type": "llama"}}
    for file, value in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(value))
    with pytest.raises(StartupError, match=r"cannot be (used|read)") as caught:
        load_tokenizer(tmp_path)
    assert len(str(caught.value)) < 800


def test_a_folder_without_tokenizer_is_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_python_code_answers_as_the_library(save: tiny.Save) -> None:
    folder = save(tiny.byte_level(), config={"model_type": "llama"}, tokenizer_config={"eos_token": "</s>"})
    fast = load_tokenizer(folder)
    slow = SlowTokenizer(AutoTokenizer.from_pretrained(folder), fast.eos_token_ids)
    ids = fast.encode("hello 世界", add_special_tokens=False)
    assert slow.encode("hello 世界", add_special_tokens=False) == ids
    assert slow.eos_token_ids == fast.eos_token_ids == (1,)
    assert slow.vocab_size == fast.vocab_size
    assert slow.bos_text is None
    assert slow.token_bytes(ids[0]) == fast.token_bytes(ids[0])
    detokenizer = slow.detokenizer()
    assert "".join([*(detokenizer.push([token_id]) for token_id in ids), detokenizer.finish()]) == "hello 世界"


def test_the_normal_path_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, fastserve.model_worker, fastserve.worker.app, fastserve.engine.client\n"
        "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
