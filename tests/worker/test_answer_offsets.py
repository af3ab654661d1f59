"""Texts and offsets of echoed prompts and of answers, for all kinds of tokenizers, are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastserve.text.load_tokenizer import load_tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker
from tests.worker.test_answer_text import BUILDERS, TEXTS, make_folder, saying

PROMPTS = ["the quick", "hello world, how", "naïve café", "你好 世", "emoji 😀 👩‍👩‍👧", "def f(x):\n    return", "a  b"]
ANSWER = " brown fox 😀 jumps über  the lazy dog.\n 世界"


async def both(worker: Running, body: dict[str, Any]) -> tuple[str, list[int], list[str]]:
    """Text, text offsets and tokens of an answer, whole and streamed, which must be the same."""
    fields = {"model": MODEL, "max_tokens": 60, "logprobs": 1, **body}
    status, answer = await worker.post(TEXTS, fields)
    assert status == 200, answer
    [choice] = answer["choices"]
    streamed: tuple[str, list[int], list[str]] = ("", [], [])
    async with worker.http.post(worker.url + TEXTS, json={**fields, "stream": True}) as response:
        for line in (await response.text()).splitlines():
            if line.startswith("data: {"):
                [part] = json.loads(line[6:])["choices"]
                entries = part["logprobs"] or {"text_offset": [], "tokens": []}
                text, offsets, tokens = streamed
                streamed = (text + part["text"], offsets + entries["text_offset"], tokens + entries["tokens"])
    whole = choice["text"], choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert streamed == whole
    return whole


@pytest.mark.parametrize("name", BUILDERS)
async def test_offsets_are_the_lengths_of_what_precedes(run_worker: RunWorker, tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    theirs = AutoTokenizer.from_pretrained(folder)

    def decode(ids: list[int]) -> str:
        return str(theirs.decode(ids, skip_special_tokens=True))

    answer = theirs.encode("x" + ANSWER, add_special_tokens=False)[1:]
    async with run_worker(saying(answer), folder=folder) as worker:
        for text in PROMPTS:
            prompt = theirs.encode(text, add_special_tokens=False)
            ids = [*prompt, *answer]
            whole = decode(ids)
            for given in (prompt, text) if decode(prompt) == text else (prompt,):
                found, offsets, _ = await both(worker, {"prompt": given, "echo": True, "add_special_tokens": False})
                assert found == whole, text
                assert len(offsets) >= len(ids)  # and the end token
                for at, offset in enumerate(offsets[: len(ids)]):
                    before = decode(ids[:at])
                    if whole.startswith(before):  # not inside a character, whose text is not known yet
                        assert offset == len(before), (text, at, theirs.convert_ids_to_tokens(ids[:at]))
                alone, offsets, _ = await both(worker, {"prompt": given, "add_special_tokens": False})
                assert decode(prompt) + alone == whole
                assert offsets[0] == 0
                assert offsets == sorted(offsets)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
async def test_an_echoed_prompt_shows_the_special_tokens_that_the_client_sent(
    run_worker: RunWorker, tmp_path: Path, name: str
) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    tokenizer = load_tokenizer(folder)
    text = "<|im_start|>the fox<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    answer = tokenizer.encode("the dog", add_special_tokens=False)
    async with run_worker(saying(answer), folder=folder) as worker:
        for given in (text, ids):
            found, offsets, tokens = await both(worker, {"prompt": given, "echo": True, "add_special_tokens": False})
            assert found.startswith(text if given is text else "<|im_start|>")
            assert tokens[0] == "<|im_start|>"
            assert offsets[0] == 0
            end = len(ids) - 1
            assert (tokens[end], found[offsets[end] :][: len("<|im_end|>")]) == ("<|im_end|>", "<|im_end|>")
            assert found[offsets[len(ids)] :].strip() == "the dog"
