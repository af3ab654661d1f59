"""A new type of part with its parser and its fields in chats, all in this file, through public interfaces only."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.engine.contract import RequestOutput, SamplingParams, TokenLogprob
from fastserve.engine.fake import Script
from fastserve.errors import InternalError
from fastserve.text.parts import ParserFactory, Part, TextParser, TextPart, plain_text
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.answer import fold, stream_answer
from fastserve.worker.caller import Caller
from fastserve.worker.choice import Choice, ChoiceDelta, OutputOptions
from fastserve.worker.jobs import AnswerOptions, Job, Prompt
from fastserve.worker.results import JobResult
from fastserve.worker.writers.chat import CHAT_FIELDS, ChatWriter, fold_deltas
from fastserve.worker.writers.completions import CompletionWriter
from tests.worker.conftest import MODEL, Running, RunWorker

OPEN, CLOSE = "<think>", "</think>"


class ReasoningPart(Part, frozen=True):
    text: str


class ReasoningParser:
    """Parses text between markers as reasoning, and holds back incomplete markers."""

    has_calls = False
    is_complete = False

    def __init__(self, choice: int = 0) -> None:
        self._held = ""
        self._is_reasoning = False

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts = []
        while (at := self._held.find(self._marker)) >= 0:
            parts += self._take(at)
            self._held = self._held[len(self._marker) :]
            self._is_reasoning = not self._is_reasoning
        begun = max(size for size in range(len(self._marker)) if self._held.endswith(self._marker[:size]))
        return parts + self._take(len(self._held) - begun)

    def finish(self, *, cut_off: bool) -> list[Part]:
        return self._take(len(self._held))

    @property
    def is_reasoning(self) -> bool:
        return self._is_reasoning

    @property
    def _marker(self) -> str:
        return CLOSE if self._is_reasoning else OPEN

    def _take(self, num_chars: int) -> list[Part]:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        return [] if not text else [ReasoningPart(text) if self._is_reasoning else TextPart(text)]


def reasoning_fields(part: ReasoningPart) -> dict[str, Any]:
    return {"reasoning_content": part.text}


FIELDS: dict[type[Part], Callable[[Any], dict[str, Any]]] = {**CHAT_FIELDS, ReasoningPart: reasoning_fields}


# ---- without an engine ------------------------------------------------------------------------------------------


def make_job(num_choices: int, output: OutputOptions) -> Job:
    prompt = Prompt(None, [1, 2], SamplingParams(max_tokens=1000))
    caller = Caller("r", None, 0.0, may_prioritise=False)
    answer = AnswerOptions(MODEL, stream=True, include_usage=True, logprobs=None, echo=False, prompt_logprobs=None)
    return Job(caller, [prompt], num_choices, num_choices, tuple(range(num_choices)), output, 0, answer)


def deltas_of(
    tokenizer: Tokenizer, ids: list[int], cuts: Iterable[int], options: OutputOptions, index: int = 0
) -> list[ChoiceDelta]:
    """The deltas of a choice whose ids arrive in outputs of the sizes `cuts`."""
    choice = Choice(index, tokenizer, SamplingParams(max_tokens=len(ids)), options)
    found, at = [], 0
    for cut in itertools.chain(cuts, itertools.repeat(len(ids))):
        part = ids[at : at + cut]
        at += cut
        output = RequestOutput("r", part, "length" if at >= len(ids) else None)
        if options.logprobs:
            output.logprobs = [TokenLogprob(token_id, -1.0, []) for token_id in part]
        delta = choice.push(output)
        if delta is not None:
            found.append(delta)
        if delta is not None and delta.finish_reason is not None:
            return found
    raise AssertionError("unreachable")


def chunks_of(events: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in events.decode().split("\n\n")]
    return [json.loads(line) for line in lines if line and line != "[DONE]" and not line.startswith(":")]


def messages_of(events: bytes) -> dict[int, dict[str, Any]]:
    """Each choice as a client merges it: strings only."""
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks_of(events):
        for choice in chunk["choices"]:
            message = joined.setdefault(choice["index"], {"finish_reason": None, "tokens": []})
            for name, value in choice["delta"].items():
                message[name] = message.get(name, "") + value
            if choice["logprobs"] is not None:
                message["tokens"] += choice["logprobs"]["content"]
            if choice["finish_reason"] is not None:
                assert message["finish_reason"] is None
                message["finish_reason"] = choice["finish_reason"]
    return joined


def whole_messages(body: bytes) -> dict[int, dict[str, Any]]:
    found = {}
    for choice in json.loads(body)["choices"]:
        message = {name: value for name, value in choice["message"].items() if name != "refusal"}
        message["content"] = message["content"] or ""  # null in a whole answer that has other parts only
        tokens = [] if choice["logprobs"] is None else choice["logprobs"]["content"]
        found[choice["index"]] = message | {"finish_reason": choice["finish_reason"], "tokens": tokens}
    return found


def expected_message(text: str) -> dict[str, str]:
    """Reference implementation of the markers."""
    pieces = re.split(f"{OPEN}(.*?)(?:{CLOSE}|\\Z)", text, flags=re.DOTALL)
    reasoning = "".join(pieces[1::2])
    message = {"role": "assistant", "content": "".join(pieces[::2])}
    return message | {"reasoning_content": reasoning} if reasoning else message


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_part_added_in_one_file_is_the_same_streamed_and_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    words = st.sampled_from(
        [OPEN, CLOSE, "<th", "ink>", "</", "think", "<", ">", "so 12", " 世界", "😀", "\n", " stop"]
    )
    stops = data.draw(st.sampled_from([(), (" stop",), ("12", "ink")]))
    has_logprobs = data.draw(st.booleans())
    interval = data.draw(st.integers(1, 4))
    num_choices = data.draw(st.integers(1, 2))
    streamed = OutputOptions(stops=stops, interval=interval, logprobs=has_logprobs, parser=ReasoningParser)
    job = make_job(num_choices, streamed)
    result, of_choices = JobResult(job), []
    for index in range(num_choices):
        text = "".join(data.draw(st.lists(words, max_size=12)))
        ids = [*tokenizer.encode(text, add_special_tokens=False), 5]
        for delta in deltas_of(tokenizer, ids, (), replace(streamed, interval=10**9), index):
            result.add(delta)
        cuts = data.draw(st.lists(st.integers(1, 4), max_size=40))
        of_choices.append(deltas_of(tokenizer, ids, cuts, streamed, index))
        cut = deltas_of(tokenizer, ids, (), OutputOptions(stops=stops, interval=10**9), index)
        expected = expected_message(plain_text(cut[0].parts))
        assert whole_messages(ChatWriter(job, 0, tokenizer, FIELDS).whole(result))[index].items() >= expected.items()
    writer = ChatWriter(job, 0, tokenizer, FIELDS)
    batches = [list(filter(None, batch)) for batch in itertools.zip_longest(*of_choices)]
    events = b"".join(map(writer.write, batches)) + writer.end(result.usage)
    assert messages_of(events) == whole_messages(ChatWriter(job, 0, tokenizer, FIELDS).whole(result))


def test_reasoning_and_text_of_one_delta_are_chunks_of_their_own(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>why</think>so", add_special_tokens=False)
    job = make_job(1, OutputOptions(logprobs=True, parser=ReasoningParser))
    (delta,) = deltas_of(tokenizer, ids, (), job.output)
    chunks = chunks_of(ChatWriter(job, 0, tokenizer, FIELDS).write([delta]))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "wh"},
        {"reasoning_content": "y"},
        {"content": "so"},
        {},
    ]
    assert [len((choice["logprobs"] or {}).get("content", ())) for choice in choices] == [0, len(ids), 0, 0, 0], "once"


def test_markers_without_a_parser_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>why</think>so", add_special_tokens=False)
    deltas = deltas_of(tokenizer, ids, [1] * len(ids), OutputOptions())
    assert plain_text([part for delta in deltas for part in delta.parts]) == "<think>why</think>so"


def test_a_format_that_does_not_support_a_part_raises(tokenizer: Tokenizer) -> None:
    job = make_job(1, OutputOptions(parser=ReasoningParser))
    ids = tokenizer.encode("<think>why</think>so", add_special_tokens=False)
    with pytest.raises(TypeError, match="does not support ReasoningPart"):
        CompletionWriter(job, 0, tokenizer).write(deltas_of(tokenizer, ids, (), job.output))


def test_deltas_fold_into_the_message_that_clients_make_of_them() -> None:
    """Two tool calls: the whole name first, then arguments in pieces."""
    message = fold_deltas(
        [
            {"content": "Let me "},
            {"content": "look."},
            {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
            {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        ]
    )
    assert message == {
        "role": "assistant",
        "content": "Let me look.",
        "refusal": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


# ---- through the worker -----------------------------------------------------------------------------------------


class DefectiveParser(TextParser):
    def push(self, text: str) -> list[Part]:
        if "1" in text:
            raise LookupError("a defect")
        return super().push(text)


def chat_job(running: Running, parser: ParserFactory, **fields: Any) -> Job:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
    caller = Caller("r", None, 0.0, may_prioritise=False)
    job = running.runtime.jobs.chat(json.dumps(body).encode(), caller)
    return replace(job, output=replace(job.output, parser=parser))


async def events_of(running: Running, job: Job, writer: ChatWriter) -> bytes:
    return b"".join([piece async for piece in stream_answer(running.runtime.service, job, writer)])


async def test_the_worker_streams_and_folds_a_new_part(
    run_worker: RunWorker, say: Callable[[str], Script], tokenizer: Tokenizer
) -> None:
    async with run_worker(say("<think>7 + 5, 世界</think>It is 12.")) as running:
        for fields in ({}, {"n": 2, "logprobs": True}, {"stop": "is"}):
            job = chat_job(running, ReasoningParser, stream=True, **fields)
            streamed = messages_of(await events_of(running, job, ChatWriter(job, 0, tokenizer, FIELDS)))
            whole_job = chat_job(running, ReasoningParser, **fields)
            result = await fold(running.runtime.service, whole_job)
            assert streamed == whole_messages(ChatWriter(whole_job, 0, tokenizer, FIELDS).whole(result))
            assert streamed[0]["reasoning_content"] == "7 + 5, 世界"
            assert streamed[0]["content"] == ("It " if "stop" in fields else "It is 12.")


async def test_a_defective_parser_fails_its_own_request_only(
    run_worker: RunWorker, say: Callable[[str], Script], tokenizer: Tokenizer
) -> None:
    async with run_worker(say("It is 12."), token_s=0.002) as running:
        jobs = [chat_job(running, parser, stream=True) for parser in (TextParser, DefectiveParser, TextParser)]
        first, failed, last = await asyncio.gather(
            *(events_of(running, job, ChatWriter(job, 0, tokenizer)) for job in jobs)
        )
        assert messages_of(first) == messages_of(last)
        assert messages_of(first)[0]["content"] == "It is 12."
        *_, error = chunks_of(failed)
        assert error["error"]["type"] == InternalError.type
        assert "defect" not in error["error"]["message"]
        await running.idle()
