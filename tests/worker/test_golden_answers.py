"""Recorded answers, byte for byte: a change of how answers are made shows here what clients would get.

`FASTSERVE_RECORD_GOLDEN=1 python -m pytest tests/worker/test_golden_answers.py` records them anew, for changes that are
meant.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.text.tokenizer import Tokenizer
from tests.worker.conftest import MODEL, Running, RunWorker

RECORDED = Path(__file__).with_name("golden_answers.json")
TEXTS = ("naïve 世界 😀 says <b>12</b>, and so on\n", "no, 13", "")
"""By choice; the third is empty."""

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
PROMPT: dict[str, Any] = {"prompt": "one 世 two", "max_tokens": 60}
FASTCHAT: dict[str, Any] = {"prompt": "A chat. USER: hello ASSISTANT:", "temperature": 0, "max_new_tokens": 60}
BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "length": {"max_tokens": 3},
    "stop": {"stop": ["never", "</"]},
    "stop kept": {"stop": "12", "include_stop_str_in_output": True},
    "stop later": {"stop": ["12", "so"], "min_tokens": 20},
    "stop token": {"stop_token_ids": [256]},
    "three": {"n": 3, "max_tokens": 9},
}
OF_CHAT: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": True},
    "top logprobs": {"logprobs": True, "top_logprobs": 2, "max_tokens": 12},
    "logprobs until a stop": {"logprobs": True, "stop": " says"},
    "two with logprobs": {"logprobs": True, "n": 2, "max_tokens": 5},
}
OF_COMPLETIONS: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 0},
    "top logprobs": {"logprobs": 2, "max_tokens": 12},
    "logprobs until a stop": {"logprobs": 1, "stop": " says"},
    "echo": {"echo": True},
    "echo with logprobs": {"echo": True, "logprobs": 1, "max_tokens": 6},
    "prompt only": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "prompts": {"prompt": ["one", "two three"], "n": 2, "max_tokens": 4},
    "prompts with echo": {"prompt": ["one", "two three"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3},
    "ids": {"prompt": [[5, 6, 7], [300, 301]], "echo": True, "max_tokens": 5},
}
ONLY_WHOLE: dict[str, dict[str, Any]] = {
    "best of": {"best_of": 3, "n": 2, "max_tokens": 5},
    "prompt logprobs": {"prompt_logprobs": 2, "max_tokens": 4},
}
OF_FASTCHAT: dict[str, dict[str, Any]] = {
    "plain": {"echo": False},
    "echo": {"echo": True},
    "echo with logprobs": {"echo": True, "logprobs": 1, "max_new_tokens": 8},
    "stop": {"echo": False, "stop": [" says", ""]},
    "no prompt": {"prompt": 5},
    "a wrong value": {"temperature": "hot"},
}


def _requests() -> dict[str, tuple[str, dict[str, Any]]]:
    """Path and body of each request by its name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    families = (("/v1/chat/completions", CHAT, OF_CHAT), ("/v1/completions", PROMPT, OF_COMPLETIONS))
    for path, common, own in families:
        kind = path.removeprefix("/v1/")
        for name, fields in (BOTH | own | ONLY_WHOLE).items():
            body = {"model": MODEL} | common | fields
            found[f"{kind}: {name}"] = path, body
            if name not in ONLY_WHOLE:
                found[f"{kind}: {name}, streamed"] = path, body | {"stream": True}
        usage = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
        found[f"{kind}: usage, streamed"] = path, {"model": MODEL} | common | usage
        for field, value in (("suffix", "x"), ("tools", [])):
            found[f"{kind}: {field}"] = path, {"model": MODEL} | common | {field: value}
    for name, fields in OF_FASTCHAT.items():
        found[f"FastChat: {name}"] = "/worker_generate", FASTCHAT | fields
        found[f"FastChat: {name}, streamed"] = "/worker_generate_stream", FASTCHAT | fields
    return found


async def _answers(running: Running) -> dict[str, str]:
    found = {}
    for name, (path, body) in _requests().items():
        async with running.http.post(running.url + path, json=body, headers={"x-request-id": "golden"}) as response:
            text = (await response.read()).decode()
        text = f"{response.status} " + re.sub(r'"created":\d+', '"created":0', text)
        text = re.sub(r'"fp_[0-9a-f]{16}"', '"fp"', text)
        # Recorded once for each answer, and short for all others.
        heads = list(dict.fromkeys(re.findall(r'data: {"id":.*?"system_fingerprint":.*?,', text)))
        for head in heads:
            first = text.index(head) + len(head)
            text = text[:first] + text[first:].replace(head, "~")
        found[name] = text
    return found


def _same(name: str, recorded: str, found: str) -> bool:
    if name.startswith("FastChat") and name.endswith("streamed"):
        # A slow reader gets one record for several tokens; each has the whole text so far.
        records, expected = found.split("\0"), recorded.split("\0")
        rest = iter(expected)
        return records[-2:] == expected[-2:] and all(record in rest for record in records)
    return found == recorded


async def test_answers_are_those_that_were_recorded(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    first_choices: dict[tuple[str, tuple[int, ...]], int] = {}

    def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        prompt = (request.request_id.rpartition("-")[0], tuple(request.prompt_ids))
        first = first_choices.setdefault(prompt, request.choice)
        return tokenizer.encode(TEXTS[request.choice - first], add_special_tokens=False)

    async with run_worker(script, max_model_len=256, token_s=0.001) as running:
        found = await _answers(running)
    if os.environ.get("FASTSERVE_RECORD_GOLDEN"):
        RECORDED.write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n")
    expected: dict[str, str] = json.loads(RECORDED.read_text())
    assert found.keys() == expected.keys()
    differing = [name for name in found if not _same(name, expected[name], found[name])]
    assert not differing, f"{differing[0]}:\n{found[differing[0]]}\nrecorded:\n{expected[differing[0]]}"
