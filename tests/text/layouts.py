"""Model folders with tokenizers in all layouts, and how one is compared with what AutoTokenizer makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fastserve.text.load_tokenizer import load_tokenizer

TEXTS = [
    "",
    "the quick brown fox jumps over the lazy dog",
    " hello  world ,how are you today ? I do n't , they 've !",
    "你好 世界 今天天气很好。 日本",
    "naïve café über straße 😀 👩‍👩‍👧 🇩🇪",
    "def f(x):\n\treturn x + 1\n",
    "<s> the</s><|im_start|>user\nhello <|im_end|> <tool call> x",
    "a<new> b <new_special>c",
    "Привет мир مرحبا שלום ✓ ½ ²³",
]
Files = dict[str, Any]
"""JSON, text or bytes by file name; a Tokenizer for tokenizer.json."""


def token(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": special, **defaults, **flags}


def write(folder: Path, files: Files) -> None:
    for name, content in {"config.json": {"model_type": "llama"}, **files}.items():
        if isinstance(content, Tokenizer):
            content.save(str(folder / name))
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")


def differences(folder: Path) -> list[str]:
    """How the folder's tokenizer differs from AutoTokenizer's: ids, texts, streams cut anywhere, special tokens."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for text in TEXTS:
        for add_special_tokens in (True, False):
            expected = theirs.encode(text, add_special_tokens=add_special_tokens)
            ids = ours.encode(text, add_special_tokens=add_special_tokens)
            if ids != expected:
                found.append(f"ids of {text!r}, {add_special_tokens}: {ids} {expected}")
        for skip in (True, False):
            whole = theirs.decode(expected, skip_special_tokens=skip)
            for cut in range(len(expected) + 1):
                detokenizer = ours.detokenizer(skip_special_tokens=skip)
                pieces = [detokenizer.push(expected[:cut]), detokenizer.push(expected[cut:]), detokenizer.finish()]
                if "".join(pieces) != whole:
                    found.append(f"text of {text!r}, {skip}, cut at {cut}: {pieces} {whole!r}")
                    break
                prompt = theirs.decode(expected[:cut], skip_special_tokens=skip)
                if not prompt or not whole.startswith(prompt):
                    continue  # its text changes with what follows
                detokenizer = ours.detokenizer(expected[:cut], skip_special_tokens=skip)
                pieces = [*(detokenizer.push([token_id]) for token_id in expected[cut:]), detokenizer.finish()]
                if prompt + "".join(pieces) != whole:
                    found.append(f"answer after {prompt!r}, {skip}: {pieces} {whole!r}")
                    break
    if ours.vocab_size != len(theirs):
        found.append(f"vocabulary {ours.vocab_size} {len(theirs)}")
    if theirs.eos_token_id is not None and theirs.eos_token_id not in ours.eos_token_ids:
        found.append(f"eos {ours.eos_token_ids} {theirs.eos_token_id}")
    hidden = {
        token_id
        for token_id in range(len(theirs))
        if theirs.decode([token_id], skip_special_tokens=True) != theirs.decode([token_id], skip_special_tokens=False)
    }
    if hidden != ours.special_ids:
        found.append(f"special {sorted(ours.special_ids)} {sorted(hidden)}")
    return found
