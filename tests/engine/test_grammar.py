"""Answers under grammars: what is generated fits, however steps are cut, drafted, overlapped and begun anew."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastserve.demo import demo_model_path
from fastserve.engine.contract import EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.grammars import GrammarStore
from fastserve.engine.sampling.grammar import Grammar
from fastserve.engine.sampling.processor import SamplingRow
from fastserve.engine.sampling.sampler import Sampler
from fastserve.engine.transfers import to_device
from fastserve.text import grammar
from fastserve.text.grammar_tokenizer import grammar_tokenizer, parser_limits
from fastserve.text.load_tokenizer import load_tokenizer

from .test_engine_equality import Answer, make_core, run

FOLDER = demo_model_path()
TOKENIZER = load_tokenizer(Path(FOLDER))
END = TOKENIZER.eos_token_ids[0]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["alpha", "beta"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
GRAMMARS = [
    grammar.of_json_schema(PERSON),
    grammar.of_json_schema(PERSON, ""),
    grammar.of_regex(r"\d{3}-[a-f]{4}"),
    grammar.of_choices(["yes", "no", 'a "third" one']),
    grammar.of_grammar('root ::= "<" [a-z]{1,8} ">" root?'),
]


def request(name: str, text: str, *, max_tokens: int = 120, **params: Any) -> EngineRequest:
    prompt = TOKENIZER.encode("Tell me about it", add_special_tokens=False)
    return EngineRequest(
        name, prompt, SamplingParams(max_tokens, stop_token_ids=(END,), grammar=text, **{"seed": 1, **params})
    )


def grammar_core(**options: Any) -> EngineCore:
    return make_core(FOLDER, **{"tokenizer_dir": FOLDER, "speculative_method": "off", **options})


def answer_all(core: EngineCore, requests: list[EngineRequest]) -> dict[str, Answer]:
    answers = {item.request_id: Answer() for item in requests}
    for item in requests:
        assert core.add(item) is None
    run(core, answers)
    return answers


@pytest.fixture(scope="module")
def core() -> EngineCore:
    return grammar_core()


def mixed(count: int) -> list[EngineRequest]:
    texts = [*GRAMMARS, ""]
    return [
        request(f"r{at}", texts[at % len(texts)], temperature=(0.0, 0.7, 1.5)[at % 3], seed=at, max_tokens=90)
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def expected(core: EngineCore) -> dict[str, Answer]:
    return {name: answer for item in mixed(12) for name, answer in answer_all(core, [item]).items()}


def test_answers_fit_their_grammar(expected: dict[str, Answer]) -> None:
    tokenizer = grammar_tokenizer(TOKENIZER, TOKENIZER.vocab_size, [END])
    store = GrammarStore(parser_limits(300_000), 0)
    store.load = lambda: tokenizer
    for item in mixed(12):
        text = item.params.grammar
        if not text:
            continue
        answer = expected[item.request_id]
        store.enter(text)
        matcher = store.start(text)
        assert matcher.consume_tokens(answer.token_ids)
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == END else "length")
        if text in GRAMMARS[:2] and answer.finish_reason == "stop":
            jsonschema.validate(json.loads(TOKENIZER.decode(answer.token_ids)), PERSON)
    store.close()


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"speculative_method": "ngram"},
        {"block_size": 4, "max_num_batched_tokens": 13, "max_total_tokens": 144, "max_model_len": 120},
        {"speculative_model_dir": FOLDER},
    ],
    ids=["overlap", "drafts", "preemption and chunks", "draft model"],
)
def test_answers_are_the_same_however_they_are_computed(expected: dict[str, Answer], options: dict[str, Any]) -> None:
    core = grammar_core(**options)
    answers = answer_all(core, mixed(12))
    assert {name: answer.token_ids for name, answer in answers.items()} == {
        name: answer.token_ids for name, answer in expected.items()
    }
    if "max_total_tokens" in options:
        assert core.scheduler.preemptions > 0


def test_forced_tokens_cost_no_step_of_their_own(core: EngineCore) -> None:
    text = grammar.of_json_schema({"const": "a long text that nothing but itself can be, and that is quite long"})
    before = core.stats.steps
    [answer] = answer_all(core, [request("forced", text)]).values()
    assert len(answer.token_ids) > 3 * (core.stats.steps - before)
    assert answer.finish_reason == "stop"


def test_an_answer_after_reasoning_ends_the_reasoning_in_time(core: EngineCore) -> None:
    end = "</tool_call>"
    text = grammar.after_reasoning(GRAMMARS[1], TOKENIZER, begin="<tool_call>", end=end, is_open=True, max_tokens=7)
    for at, answer in enumerate(answer_all(core, [request(f"t{n}", text, seed=n) for n in range(4)]).values()):
        found = TOKENIZER.decode(answer.token_ids)
        thought, _, rest = found.partition(end)
        assert len(TOKENIZER.encode(thought, add_special_tokens=False)) <= 14, at
        jsonschema.validate(json.loads(rest), PERSON)


def test_a_grammar_that_is_compiled_delays_nobody() -> None:
    core = grammar_core()
    store = core._grammars
    assert store is not None
    load = store.load
    assert load is not None

    def slow() -> Any:
        time.sleep(0.4)
        return load()

    store.load = slow
    for item in (request("waits", GRAMMARS[2]), request("goes on", "", max_tokens=8)):
        assert core.add(item) is None
    finished: list[str] = []
    while core.has_work:
        finished += [output.request_id for output in core.step() if output.finish_reason is not None]
    assert finished == ["goes on", "waits"]


@pytest.mark.parametrize(
    "text",
    ['start: "', "start: <|nobody|>", "start: " + "(" * 500, 'start: ((a{100}){100}){10}\na: "b" "c"'],
    ids=["syntax", "token", "brackets", "items"],
)
def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(core: EngineCore, text: str) -> None:
    outputs: list[RequestOutput] = []
    for item in (request("bad", text, max_tokens=200, temperature=1.0), request("good", GRAMMARS[2])):
        assert core.add(item) is None
    while core.has_work:
        outputs += core.step()
    last = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert last["good"].finish_reason == "stop"
    assert last["bad"].finish_reason == "error"
    assert last["bad"].error_kind == "InvalidRequestError"
    assert "grammar" in (last["bad"].error or "")
    core.scheduler.check()


def test_an_aborted_request_leaves_nothing_behind(core: EngineCore) -> None:
    for at in range(3):
        core.add(request(f"a{at}", GRAMMARS[0]))
        if at:
            core.step()
        core.abort(f"a{at}")
    assert not core.has_work
    store = core._grammars
    assert store is not None
    assert not any(item.num_users for item in store._grammars.values())


def test_grammars_without_users_are_kept_up_to_a_bound() -> None:
    tokenizer = grammar_tokenizer(TOKENIZER, TOKENIZER.vocab_size, [END])
    texts = [grammar.of_choices([f"choice {at}"]) for at in range(20)]
    store = GrammarStore(parser_limits(300_000), max_idle_bytes=5 * len(texts[-1]))
    store.load = lambda: tokenizer
    for text in texts:
        store.enter(text)
        store.wait(5)
        store.leave(text)
    assert list(store._grammars) == texts[-5:]
    store.close()


def test_masks_cover_the_whole_vocabulary_and_follow_wrong_drafts() -> None:
    tokenizer = grammar_tokenizer(TOKENIZER, TOKENIZER.vocab_size, [END])
    store = GrammarStore(parser_limits(300_000), 0)
    store.load = lambda: tokenizer
    store.enter(GRAMMARS[1])
    processor = Grammar(store)
    sampler = Sampler([processor])
    params = SamplingParams(50, grammar=GRAMMARS[1])
    state = sampler.start(params, 0, 1)
    good = TOKENIZER.encode('{"name":"', add_special_tokens=False)
    wrong = TOKENIZER.encode("oh", add_special_tokens=False)[0]
    wide = TOKENIZER.vocab_size + 100

    def allowed(*sequences: list[int]) -> list[set[int]]:
        rows = [SamplingRow(state, np.array([5, *tokens], dtype=np.int32)) for tokens in sequences]
        inputs = processor.step_inputs(iter(enumerate(rows)), wide)
        assert inputs is not None
        values = torch.zeros(len(rows), wide)
        processor.apply(values, to_device(inputs, values.device))
        return [set((row > -1).nonzero().flatten().tolist()) for row in values]

    [first] = allowed([])
    assert good[0] in first
    assert max(first) < TOKENIZER.vocab_size
    assert allowed([], [good[0]], [good[0], wrong])[:2] == [first, allowed(good[:1])[0]]
    assert allowed(good[:1], good[:2])[0] == allowed(good[:1])[0]
    assert allowed([])[0] == first, "an answer that is taken back"
    store.close()


# ---- generated schemas ------------------------------------------------------------------------------------------

_NAMES = st.sampled_from(["a", "b", "item", "näme", 'q"t', "x y"])
_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50), st.integers(0, 99),
    ),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low, "maximum": low + 2.5}, st.integers(-9, 9)),
    st.builds(lambda n: {"type": "integer", "multipleOf": n, "minimum": -100, "maximum": 1000}, st.integers(1, 13)),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 3), st.integers(0, 6),
    ),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-c]{2,4}$", "^x\\d+y$", "[0-9]{2}", "^(ab|cd)*$")]),
    st.sampled_from([{"type": "string", "format": f} for f in ("date", "time", "uuid", "ipv4", "date-time")]),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.sampled_from([2, "one", None, True, [2], {"k": 3}, "ü"]), min_size=1, max_size=3),
    ),
    st.builds(lambda value: {"const": value}, st.sampled_from(["fixed", 7, None, {"n": [1, "two"]}])),
)  # fmt: skip


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], num_required: int, additional: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:num_required],
            "additionalProperties": additional,
        }

    return st.builds(
        build, st.dictionaries(_NAMES, inner, max_size=3), st.integers(0, 3), st.one_of(st.just(False), inner)
    )


def _arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda item, low, more: {"type": "array", "items": item, "minItems": low, "maxItems": low + more},
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
        st.builds(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)},
            st.lists(inner, min_size=1, max_size=3),
        ),
    )  # fmt: skip


SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


REFERENCES = st.builds(
    lambda part, others: {**others, "$defs": {"part": part}, "properties": {"p": {"$ref": "#/$defs/part"}}},
    SCHEMAS,
    st.just({"type": "object", "required": ["p"], "additionalProperties": False}),
)


def check_schemas(core: EngineCore, schemas: list[dict[str, Any]], max_tokens: int = 150) -> int:
    """Generate an answer for each schema; return how many were not cut off, all of which must be valid."""
    requests = [
        request(f"s{at}", grammar.of_json_schema(schema), seed=at, temperature=1.0, max_tokens=max_tokens)
        for at, schema in enumerate(schemas)
    ]
    answers = answer_all(core, requests)
    num_whole = 0
    for at, schema in enumerate(schemas):
        answer = answers[f"s{at}"]
        assert answer.finish_reason in ("stop", "length"), schema
        if answer.finish_reason == "stop":
            num_whole += 1
            text = TOKENIZER.decode(answer.token_ids)
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    return num_whole


def generated(count: int, seed: int) -> list[dict[str, Any]]:
    schemas: list[dict[str, Any]] = [TREE]

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(SCHEMAS, REFERENCES))
    def collect(schema: dict[str, Any]) -> None:
        schemas.append(schema)

    collect()
    random.Random(seed).shuffle(schemas)
    return schemas


def test_what_is_generated_under_a_schema_is_valid(core: EngineCore) -> None:
    schemas = generated(60, 0)
    assert check_schemas(core, schemas) > len(schemas) // 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["off", "ngram"])
def test_what_is_generated_under_300_schemas_is_valid(method: str) -> None:
    schemas = generated(300, 1)
    assert check_schemas(grammar_core(speculative_method=method), schemas, 400) > len(schemas) // 2
