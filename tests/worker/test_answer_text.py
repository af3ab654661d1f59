"""The text of answers: where it begins, which stop strings end it, and which special tokens it contains."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.engine.contract import EngineInfo, EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.fake import Script, noise
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.parts import plain_text
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import Choice, OutputOptions
from tests.text import tiny_tokenizers as tiny
from tests.worker.conftest import MODEL, Running, RunWorker

TEXTS = "/v1/completions"
CHAT = "/v1/chat/completions"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}<|im_start|>"
BUILDERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": tiny.byte_level,
    "metaspace": tiny.metaspace,
    "sentencepiece": tiny.sentencepiece,
    "word_piece": tiny.word_piece,
}


def make_folder(path: Path, builder: Callable[[], tokenizers.Tokenizer]) -> Path:
    tokenizer = builder()
    tokenizer.save(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    config = {"vocab_size": max(tokenizer.get_vocab().values()) + 1, "eos_token_id": end}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return path


def saying(ids: Iterable[int]) -> Script:
    answer = list(ids)

    def script(request: EngineRequest, info: EngineInfo) -> list[int]:
        return answer

    return script


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens by their names."""
    return {tokenizer.token_bytes(token_id).decode(): token_id for token_id in tokenizer.special_ids}


async def answers(worker: Running, path: str, **body: Any) -> tuple[str, str]:
    """Text and finish_reason, whole and streamed, which must be the same."""
    fields = {"model": MODEL, "max_tokens": 50, **body}
    status, answer = await worker.post(path, fields)
    assert status == 200, answer
    [choice] = answer["choices"]
    whole = choice["message"]["content"] if path == CHAT else choice["text"]
    text, reason = "", None
    async with worker.http.post(worker.url + path, json={**fields, "stream": True}) as response:
        for line in (await response.text()).splitlines():
            if line.startswith("data: {"):
                [choice] = json.loads(line[6:])["choices"]
                text += (choice.get("text") or "") + (choice.get("delta", {}).get("content") or "")
                reason = choice["finish_reason"] or reason
    assert (text, reason) == (whole, answer["choices"][0]["finish_reason"])
    return whole, str(reason)


# ---- the beginning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
async def test_a_completion_continues_the_text_of_its_prompt(run_worker: RunWorker, tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.encode("the quick brown fox", add_special_tokens=False)
    prompt = tokenizer.encode("the quick", add_special_tokens=False)
    assert whole[: len(prompt)] == prompt
    async with run_worker(saying(whole[len(prompt) :]), folder=folder) as worker:
        for given in ("the quick", prompt):
            assert await answers(worker, TEXTS, prompt=given) == (" brown fox", "stop")
        assert (await answers(worker, TEXTS, prompt="the quick", echo=True))[0] == "the quick brown fox"


@pytest.mark.parametrize("name", ["metaspace", "sentencepiece"])
async def test_a_message_and_a_completion_of_nothing_are_texts_of_their_own(
    run_worker: RunWorker, tmp_path: Path, name: str
) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.token_bytes(1).decode()
    async with run_worker(saying(tokenizer.encode("the fox", add_special_tokens=False)), folder=folder) as worker:
        messages = [{"role": "user", "content": "the quick"}]
        assert (await answers(worker, CHAT, messages=messages))[0] == "the fox"
        assert (await answers(worker, TEXTS, prompt=bos, add_special_tokens=False))[0] == "the fox"


# ---- stop strings -----------------------------------------------------------------------------------------------

IM_END = "<|im_end|>"


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("stop", "include", "expected"),
    [
        (IM_END, False, "the fox"),
        (IM_END, True, "the fox" + IM_END),
        ("fox" + IM_END, False, "the "),
        (IM_END + "<|im_start|>", True, "the fox" + IM_END + "<|im_start|>"),
        ("never", False, None),
    ],
)
async def test_a_stop_string_may_contain_special_tokens(
    run_worker: RunWorker, tmp_path: Path, name: str, stop: str, include: bool, expected: str | None
) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    tokenizer = load_tokenizer(folder)
    text = tokenizer.encode("the fox", add_special_tokens=False)
    special = special_ids(tokenizer)
    answer = [*text, special[IM_END], special["<|im_start|>"], *text]
    async with run_worker(saying(answer), folder=folder) as worker:
        found = await answers(
            worker, CHAT, messages=[{"role": "user", "content": "the"}], stop=stop, include_stop_str_in_output=include
        )
    assert found == (tokenizer.decode(answer) if expected is None else expected, "stop")


def folded(folder: Path, ids: list[int], stop: str, **params: Any) -> str:
    tokenizer = load_tokenizer(folder)
    choice = Choice(0, tokenizer, SamplingParams(max_tokens=len(ids), **params), OutputOptions((stop,)))
    text = ""
    for at, token_id in enumerate(ids):
        delta = choice.push(RequestOutput("r", [token_id], "length" if at == len(ids) - 1 else None))
        if delta is not None:
            text += plain_text(delta.parts)
            if delta.finish_reason is not None:
                return text + "|" + delta.finish_reason
    raise AssertionError("no end")


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_it_counts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tiny.byte_level)
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(char, add_special_tokens=False)[0] for char in "xabyabz"]
    assert folded(folder, ids, "ab") == "x|stop"
    assert folded(folder, ids, "ab", min_tokens=3) == "x|stop", "its last character is the third token"
    assert folded(folder, ids, "aby", min_tokens=4) == "x|stop"
    assert folded(folder, ids, "ab", min_tokens=4) == "xaby|stop", "the first is complete before"
    assert folded(folder, ids, "ab", min_tokens=7) == "xabyabz|length"


@functools.cache
def loaded() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(make_folder(Path(folder), tiny.byte_level))


def expected_answer(ids: list[int], stop: str, params: SamplingParams, options: OutputOptions) -> tuple[str, str]:
    """Reference implementation: the end of the answer after each character, as clients see it and with names."""
    tokenizer = loaded()
    visible, full, visible_at = "", "", [0]
    for at, token_id in enumerate(ids, start=1):
        hidden = options.skip_special_tokens and token_id in tokenizer.special_ids
        for char in tokenizer.token_bytes(token_id).decode():
            full += char
            visible += "" if hidden else char
            visible_at.append(len(visible))
            if at < params.min_tokens:
                continue
            start = None
            if not hidden and visible.endswith(stop):
                start = len(visible) - len(stop)
            elif full.endswith(stop):
                start = visible_at[len(full) - len(stop)]
            if start is not None:
                return visible[:start] + (stop if options.include_stop else ""), "stop"
    return visible, "length"


@settings(max_examples=300)
@given(data=st.data())
def test_a_stop_string_is_found_at_the_same_place_however_tokens_come(data: st.DataObject) -> None:
    tokenizer = loaded()
    words = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("a", "b", "the", " the")]
    ids = data.draw(st.lists(st.sampled_from([*words, *special_ids(tokenizer).values()]), min_size=1, max_size=12))
    names = "".join(tokenizer.token_bytes(token_id).decode() for token_id in ids)
    start = data.draw(st.integers(0, len(names) - 1))
    stop = names[start : start + data.draw(st.integers(1, 24))]
    params = SamplingParams(max_tokens=len(ids), min_tokens=data.draw(st.integers(0, len(ids))))
    flags = st.booleans()
    options = OutputOptions((stop,), skip_special_tokens=data.draw(flags), include_stop=data.draw(flags))
    choice, text, reason, at = Choice(0, tokenizer, params, options), "", None, 0
    while reason is None:
        end = min(len(ids), at + data.draw(st.integers(1, 4)))
        delta = choice.push(RequestOutput("r", ids[at:end], "length" if end == len(ids) else None))
        at = end
        if delta is not None:
            text += plain_text(delta.parts)
            reason = delta.finish_reason
    assert (text, reason) == expected_answer(ids, stop, params, options)


# ---- special tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
async def test_special_tokens_are_shown_where_the_request_wants_them(
    run_worker: RunWorker, tmp_path: Path, name: str
) -> None:
    folder = make_folder(tmp_path, BUILDERS[name])
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text: list[int] = raw.encode("the fox", add_special_tokens=False).ids
    special = special_ids(load_tokenizer(folder))
    ids = [*text, special[IM_END], special["<|im_start|>"], *text]
    messages = [{"role": "user", "content": "the"}]
    async with run_worker(saying(ids), folder=folder) as worker:
        hidden = (await answers(worker, CHAT, messages=messages))[0]
        for spaces in (True, False, None):
            fields = {"skip_special_tokens": False, "spaces_between_special_tokens": spaces}
            shown = (await answers(worker, CHAT, messages=messages, **fields))[0]
            assert shown == raw.decode(ids, skip_special_tokens=False)
        assert hidden == raw.decode(ids, skip_special_tokens=True) != shown
        stopped = await answers(worker, CHAT, messages=messages, skip_special_tokens=False, stop=IM_END)
    assert stopped == (shown[: shown.index(IM_END)], "stop")


async def test_special_tokens_are_added_to_a_prompt_where_the_request_wants_them(
    run_worker: RunWorker, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, tiny.sentencepiece)
    async with run_worker(saying([5]), folder=folder) as worker:
        messages = [{"role": "user", "content": "the"}]
        bodies: list[tuple[str, dict[str, Any], bool]] = [
            (TEXTS, {"prompt": "the"}, True),
            (CHAT, {"messages": messages}, False),
        ]
        for path, body, default in bodies:
            for value in (None, True, False):
                await worker.post(path, {"model": MODEL, "max_tokens": 1, "add_special_tokens": value, **body})
                has_bos = worker.engine.requests[-1].prompt_ids[0] == 1
                assert has_bos == (default if value is None else value)
        status, answer = await worker.post(TEXTS, {"model": MODEL, "prompt": "the", "add_special_tokens": "no"})
        assert (status, answer["error"]["param"]) == (400, "add_special_tokens")


# ---- equal prompts ----------------------------------------------------------------------------------------------


async def test_equal_prompts_of_one_request_are_sampled_apart(run_worker: RunWorker) -> None:
    body = {"model": MODEL, "prompt": ["one"] * 3, "n": 2, "temperature": 1, "max_tokens": 12}
    async with run_worker(noise) as worker:
        for seed in ({}, {"seed": 7}):
            _, answer = await worker.post(TEXTS, body | seed)
            assert len({choice["text"] for choice in answer["choices"]}) == 6
        _, again = await worker.post(TEXTS, body | seed)
        assert again["choices"] == answer["choices"], "a seed gives the same answer again"
        _, alone = await worker.post(TEXTS, body | seed | {"prompt": "one"})
        assert alone["choices"] == answer["choices"][:2]


@pytest.mark.parametrize("fields", [{}, {"presence_penalty": 1.5, "repetition_penalty": 1.2}, {"best_of": 3}])
async def test_equal_prompts_of_token_ids_are_sampled_apart(run_worker: RunWorker, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": [[5, 6, 7]] * 3, "n": 2, "temperature": 1, "max_tokens": 12, **fields}
    async with run_worker(noise) as worker:
        _, answer = await worker.post(TEXTS, body | {"seed": -3})
        assert len({choice["text"] for choice in answer["choices"]}) == 6
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        num_runs = 3 * fields.get("best_of", 2)
        assert sorted(request.choice for request in worker.engine.requests) == list(range(num_runs))
        _, mixed = await worker.post(TEXTS, body | {"seed": -3, "prompt": [[8], [5, 6, 7], [5, 6, 7]]})
        assert mixed["choices"][2:] == answer["choices"][2:], "it does not matter what the other prompts are"
        _, greedy = await worker.post(TEXTS, body | {"temperature": 0})
        assert len({choice["text"] for choice in greedy["choices"]}) == 1
