"""The bundled demo model answers unseen questions. The cases are in demo_model/evaluate.py."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer  # noqa: E402

from demo_model import data, evaluate, phrases  # noqa: E402
from demo_model.chat import segments  # noqa: E402
from demo_model.evaluate import Case, Outcome  # noqa: E402
from demo_model.facts import FACTS  # noqa: E402
from fastserve.demo import MODEL_NAME, demo_model_path  # noqa: E402

Ask = Any  # a function from cases to their outcomes


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return evaluate.load(demo_model_path())


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is not faster with two threads, and much slower if the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ask(loaded: tuple[Any, Any]) -> Ask:
    def run(cases: list[Case], at_least: float) -> list[Outcome]:
        assert cases, "no cases, nothing is checked"
        outcomes = list(evaluate.answer_all(*loaded, cases))
        assert len(outcomes) == len(cases)
        endless = [(o.case.messages[-1]["content"], o.answer) for o in outcomes if not o.ended]
        assert not endless, f"no end token: {endless[:5]}"
        wrong = [(o.case.messages[-1]["content"], o.answer) for o in outcomes if not o.right]
        assert len(wrong) <= (1 - at_least) * len(cases), f"{len(wrong)} of {len(cases)} wrong: {wrong[:5]}"
        return outcomes

    return run


def test_folder_is_small_and_complete() -> None:
    folder = Path(demo_model_path())
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15e6
    assert MODEL_NAME == "fastserve-demo"


def test_config_names_the_end_token(tokenizer: Any) -> None:
    folder = Path(demo_model_path())
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert config["eos_token_id"] == generation["eos_token_id"] == plain.token_to_id("<|im_end|>")
    assert plain.encode("12").tokens == ["1", "2"]


def test_tokenizer_gives_back_any_text(tokenizer: Any) -> None:
    for text in ("12 + 30 = 42", "  two  spaces\n\ttab", "Zürich, 東京, naïve ☃ 🙂", '{"a": [1, "b"]}', "<tool_call>x"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_template_writes_what_training_used(tokenizer: Any) -> None:
    rng = Random(1)
    for _ in range(200):
        tools = data.sample_tools(rng) if rng.random() < 0.5 else []
        messages = [data.make_system(rng)] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            messages += data.make_exchange(rng, tools)
        expected = [text for text, _ in segments(messages, tools)]
        rendered = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        assert rendered == "".join(expected)
        pieces = [token for text in expected for token in tokenizer(text)["input_ids"]]
        assert tokenizer(rendered)["input_ids"] == pieces


def test_template_takes_what_clients_send(tokenizer: Any) -> None:
    def render(message: data.Message) -> str:
        return str(tokenizer.apply_chat_template([message], tokenize=False))

    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert render({"role": "assistant", "content": None, "tool_calls": [call]}) == (
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
    )
    parts = [{"type": "text", "text": "7 + "}, {"type": "text", "text": "5"}]
    assert render({"role": "user", "content": parts}) == "<|im_start|>user\n7 + 5<|im_end|>\n"


def test_a_tenth_of_the_pairs_is_held_out() -> None:
    pairs = set(evaluate.held_out_pairs())
    assert len(pairs) >= 250
    assert all((b, a) in pairs for a, b in pairs)
    rng = Random(2)
    assert pairs.isdisjoint(data.sample_terms(rng) for _ in range(20000))
    assert pairs.isdisjoint(data.sample_expression(rng)[:2] for _ in range(20000))


def test_seven_plus_five(ask: Ask) -> None:
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": "What is 7 + 5?"}
    right = evaluate.equals("12")
    ask([Case([user], right), Case([system, user], right)], at_least=1)


@pytest.mark.parametrize("wording", ["What is {a} + {b}?", "{a}+{b}", *phrases.UNSEEN_SUM_QUESTIONS[:1]])
def test_held_out_sums(ask: Ask, wording: str) -> None:
    ask(evaluate.sum_cases(wording), at_least=0.95)


def test_held_out_sums_in_a_later_turn(ask: Ask) -> None:
    ask(evaluate.later_sum_cases(), at_least=0.95)


def test_facts_on_unseen_wordings(ask: Ask) -> None:
    assert len(FACTS) >= 25
    shown = {text.lower() for fact in FACTS for text in fact.questions}
    assert shown.isdisjoint(text.lower() for fact in FACTS for text in fact.unseen)
    right = {o.case.messages[0]["content"] for o in ask(evaluate.fact_cases(), at_least=0.9) if o.right}
    assert [fact.key for fact in FACTS if right.isdisjoint(fact.unseen)] == []


def test_keys_of_facts_are_distinct() -> None:
    keys = sorted(fact.key for fact in FACTS)
    assert all(first != second for first, second in pairwise(keys))
    for fact in FACTS:
        assert [other.key for other in FACTS if other is not fact and other.key in fact.answer] == []


@pytest.mark.parametrize(
    ("group", "at_least"),
    [
        ("greetings", 0.9),
        ("unknown", 0.8),
        ("counting", 0.8),
        ("stories", 1.0),
        ("copying", 0.9),
        ("json", 0.9),
        ("names", 0.75),
        ("weather calls", 0.9),
        ("weather calls, unseen city", 0.4),
        ("calculator calls", 0.9),
        ("answers after a tool", 0.9),
        ("tools not needed", 0.8),
    ],
)
def test_group(ask: Ask, group: str, at_least: float) -> None:
    ask(evaluate.all_cases()[group], at_least)


def test_held_out_sums_in_bfloat16() -> None:
    outcomes = list(
        evaluate.answer_all(*evaluate.load(demo_model_path(), torch.bfloat16), evaluate.sum_cases("What is {a} + {b}?"))
    )
    assert sum(o.right for o in outcomes) > 0.95 * len(outcomes)
