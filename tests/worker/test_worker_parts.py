"""Unit tests: choices, sampling defaults, progress, histogram, mailbox."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Histogram, Metric

from fastserve.demo import demo_model_path
from fastserve.engine.contract import LoadProgress, RequestOutput, SamplingParams, TokenLogprob
from fastserve.openai.completions import CompletionRequest
from fastserve.text.load_tokenizer import load_tokenizer
from fastserve.text.parts import plain_text
from fastserve.worker.choice import Choice, ChoiceDelta, OutputOptions
from fastserve.worker.mailbox import Mailbox
from fastserve.worker.metrics import QuickHistogram
from fastserve.worker.progress import ProgressBar, ProgressLines, progress_reporter
from fastserve.worker.sampling_params import SamplingDefaults, read_defaults, resolve

TOKENIZER = load_tokenizer(Path(demo_model_path()))
EOS = TOKENIZER.eos_token_ids[0]


def fold(ids: list[int], cuts: list[int], interval: int, logprobs: int | None, stops: list[str]) -> list[ChoiceDelta]:
    params = SamplingParams(max_tokens=len(ids), stop_token_ids=(EOS,), logprobs=logprobs)
    options = OutputOptions(tuple(stops), interval=interval, logprobs=logprobs is not None)
    choice = Choice(0, TOKENIZER, params, options)
    deltas, at = [], 0
    for cut in [*cuts, len(ids)]:
        part = ids[at : at + cut]
        at += cut
        ended = at >= len(ids)
        output = RequestOutput("r", part, ("stop" if part[-1:] == [EOS] else "length") if ended else None)
        if logprobs is not None:
            output.logprobs = [TokenLogprob(token_id, -1.0, []) for token_id in part]
        delta = choice.push(output)
        if delta is not None:
            deltas.append(delta)
        if ended or (delta is not None and delta.finish_reason):
            break
    return deltas


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_chunks_intervals_and_logprobs_change_no_text(data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(["hello", " world", " 世界", "😀", "12", "\n", " stop"]), max_size=12))
    ids = TOKENIZER.encode("".join(words), add_special_tokens=False) + data.draw(st.sampled_from([[EOS], [5]]))
    stops = data.draw(st.sampled_from([[], ["world"], [" stop", "12"]]))
    cuts = data.draw(st.lists(st.integers(1, 4), max_size=30))
    (plain,) = fold(ids, [], 10**9, None, stops)
    deltas = fold(ids, cuts, data.draw(st.integers(1, 5)), data.draw(st.sampled_from([None, 0])), stops)
    assert "".join(plain_text(delta.parts) for delta in deltas) == plain_text(plain.parts)
    assert (deltas[-1].finish_reason, deltas[-1].num_tokens) == (plain.finish_reason, plain.num_tokens)
    tokens = [token for delta in deltas for token in delta.tokens or []]
    if tokens and plain.finish_reason == "stop":
        written = b"".join(token.data for token in tokens).decode(errors="replace")
        assert written.startswith(plain_text(plain.parts))
        assert all(token.text_offset < len(plain_text(plain.parts)) for token in tokens)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": True, "top_p": 0.95, "typical_p": 0.9}, {"top_p": 0.95, "typical_p": 0.9}),
        (
            {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"temperature": None}, {}),
    ],
)
def test_the_models_own_defaults(tmp_path: Path, config: dict[str, Any] | None, expected: SamplingDefaults) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_defaults(tmp_path) == expected


def resolved(fields: dict[str, Any], defaults: SamplingDefaults, eos_token_ids: tuple[int, ...] = ()) -> SamplingParams:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "x"} | fields)
    return resolve(
        request,
        defaults,
        max_tokens=8,
        seed=77,
        logprobs=None,
        prompt_logprobs=None,
        eos_token_ids=eos_token_ids,
        vocab_size=100,
    )


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"])
def test_a_parameter_comes_from_the_request_then_the_model_then_the_default(name: str) -> None:
    request, model = {"top_k": (5, 9)}.get(name, (0.5, 0.25))
    assert getattr(resolved({name: request}, {name: model}), name) == request
    assert getattr(resolved({name: None}, {name: model}), name) == model
    assert resolved({}, {}) == SamplingParams(8, seed=77)


def test_every_sampling_parameter_of_a_request_reaches_the_engine() -> None:
    made_of_others = {"bad_token_ids", "grammar", "thinking"}
    by_name = set(SamplingParams.__struct_fields__) - made_of_others
    assert by_name <= CompletionRequest.model_fields.keys(), "they go by their names"
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.5,
        "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": 3, "min_tokens": 2,
        "allowed_token_ids": (4, 7),
    }  # fmt: skip
    asked = fields | {"allowed_token_ids": [4, 7]}
    params = resolved(asked | {"logit_bias": {"4": 1}, "stop_token_ids": [9, 5]}, {}, (5, 6))
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.logit_bias, params.stop_token_ids) == ({4: 1.0}, (9, 5, 6))
    assert resolved({"min_tokens": 20}, {}).min_tokens == 8, "no more than there will be"


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1e-6}, {"top_p": 0}, {"top_k": 1}])
def test_values_that_leave_one_token_are_greedy(fields: dict[str, Any]) -> None:
    params = resolved(fields, {"temperature": 0.7, "top_k": 20})
    assert (params.temperature, params.top_p) == (0.0, 1.0)


def test_progress_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    lines = ProgressLines(lambda: now)
    with caplog.at_level(logging.INFO):
        for done in range(1001):
            lines(LoadProgress("loading weights", done * 1000, 1_000_000))
        assert len(caplog.records) == 11
        now = 6.0
        lines(LoadProgress("loading weights", 1_000_000, 1_000_000))
    assert caplog.records[1].message == "loading weights: 10 % of 1.0 MB"
    assert len(caplog.records) == 12


def test_progress_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report = progress_reporter(stream)
    assert isinstance(report, ProgressBar)
    for done in (0, 50, 100):
        report(LoadProgress("loading weights", done, 100))
    assert "loading weights: 100%" in stream.getvalue()
    assert isinstance(progress_reporter(io.StringIO()), ProgressLines)


def test_the_quick_histogram_equals_prometheus_own() -> None:
    bounds, values = (0.001, 0.25, 2.5), [0.0005, 0.001, 0.0011, 0.3, 0.3, 7.0]
    own, quick = Histogram("gap", "Gaps.", buckets=bounds, registry=None), QuickHistogram("gap", "Gaps.", bounds)
    for value in values:
        own.observe(value)
        quick.observe(value)
    ((expected,), (found,)) = own.collect(), quick.collect()

    def values_of(metric: Metric) -> dict[tuple[str, str], float]:
        samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return {(sample.name, sample.labels.get("le", "")): sample.value for sample in samples}

    assert values_of(found) == pytest.approx(values_of(expected))
    assert values_of(found)["gap_bucket", "0.25"] == 3


async def test_a_mailbox_gives_everything_then_ticks_then_ends() -> None:
    box: Mailbox[int] = Mailbox(tick_s=0.05)
    box.put(1)
    box.put(2)
    assert await box.take() == [1, 2]
    loop = asyncio.get_running_loop()
    for _ in range(3):  # the timer of one wait must not shorten the next
        loop.call_later(0.03, box.put, 3)
        assert await box.take() == [3]
    for _ in range(2):
        began = loop.time()
        assert await box.take() == []
        assert 0.045 < loop.time() - began < 1
    loop.call_soon(box.put, 4)
    loop.call_soon(box.close)
    assert await box.take() == [4]
    assert await box.take() is None
