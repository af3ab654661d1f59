"""The held-out questions, each with its check, and how many of them a model gets right."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model import data, phrases
from demo_model.data import ALPHABET, SEED, Message
from demo_model.facts import FACTS
from demo_model.words import CITIES, CONDITIONS, NAMES, UNSEEN_CITIES, UNSEEN_NAMES, WORDS


@dataclass(frozen=True)
class Case:
    messages: list[Message]
    is_right: Callable[[str], bool]
    tools: list[Message] = field(default_factory=list)
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Outcome:
    case: Case
    answer: str
    ended: bool  # by the end token, within the case's limit

    @property
    def right(self) -> bool:
        return self.ended and self.case.is_right(self.answer)


def question(text: str, is_right: Callable[[str], bool], max_new_tokens: int = 48) -> Case:
    return Case([{"role": "user", "content": text}], is_right, max_new_tokens=max_new_tokens)


def equals(text: str) -> Callable[[str], bool]:
    return lambda answer: answer == text


def contains(*texts: str) -> Callable[[str], bool]:
    return lambda answer: all(text in answer for text in texts)


def starts_with(*texts: str) -> Callable[[str], bool]:
    return lambda answer: answer.startswith(texts)


def is_json(value: object) -> Callable[[str], bool]:
    def check(answer: str) -> bool:
        try:
            return bool(json.loads(answer) == value)
        except json.JSONDecodeError:
            return False

    return check


def calls(name: str, arguments: dict[str, Any]) -> Callable[[str], bool]:
    start, end = "<tool_call>\n", "\n</tool_call>"
    expected = is_json({"name": name, "arguments": arguments})
    return lambda text: text.startswith(start) and text.endswith(end) and expected(text[len(start) : -len(end)])


def held_out_pairs() -> list[tuple[int, int]]:
    return [(a, b) for a in range(50) for b in range(50) if data.is_held_out_sum(a, b)]


def sum_cases(template: str) -> list[Case]:
    return [question(template.format(a=a, b=b), equals(str(a + b)), 8) for a, b in held_out_pairs()]


def later_sum_cases(num: int = 60) -> list[Case]:
    """The sum comes after other turns, half of the time behind a system message."""
    rng = Random(SEED + 1)
    cases = []
    for a, b in rng.sample(held_out_pairs(), num):
        messages = [data.make_system(rng)] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            messages += data.make_exchange(rng, [])
        messages.append({"role": "user", "content": f"What is {a} + {b}?"})
        cases.append(Case(messages, equals(str(a + b)), max_new_tokens=8))
    return cases


def fact_cases() -> list[Case]:
    return [question(text, contains(fact.key)) for fact in FACTS for text in fact.unseen]


def greeting_cases() -> list[Case]:
    unseen = [question(text, starts_with(*data.GREETINGS.values())) for text in phrases.UNSEEN_GREETINGS]
    combined = [(text, start) for text, start in data.all_greetings(held_out=True)]
    chosen = Random(SEED).sample(combined, min(40, len(combined)))
    return unseen + [question(text, starts_with(start)) for text, start in chosen]


def unknown_cases() -> list[Case]:
    rng = Random(SEED + 2)
    templates = phrases.UNSEEN_UNKNOWN_QUESTIONS * 4
    return [question(data.fill(rng, text), equals(data.UNKNOWN)) for text in templates]


def count_cases() -> list[Case]:
    held_out = [n for n in range(4, 51) if data.is_held_out("count", n)]
    return [question(f"Count from 1 to {n}.", equals(data.count(1, n)), 4 * n + 10) for n in sorted({*held_out, 5, 50})]


def long_cases() -> list[Case]:
    tales = [question(f"Tell me a story about a {hero}.", equals(text), 200) for hero, text in data.STORIES.items()]
    return [*tales, question("Say the alphabet.", equals(ALPHABET), 100)]


def copy_cases(num: int = 60) -> list[Case]:
    rng = Random(SEED + 3)
    texts: list[str] = []
    while len(texts) < num:
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
        if data.is_held_out("copy", text):
            texts.append(text)
    return [question(f"Repeat after me: {text}", equals(text)) for text in texts]


def json_cases(num: int = 30) -> list[Case]:
    rng = Random(SEED + 4)
    cases = [
        question(f"Answer in JSON: what is {a} + {b}?", is_json({"answer": a + b}))
        for a, b in rng.sample(held_out_pairs(), num)
    ]
    people: set[tuple[str, int]] = set()
    while len(people) < num:
        name, age = rng.choice(NAMES), rng.randint(1, 99)
        if data.is_held_out("person", name, age):
            people.add((name, age))
    return cases + [
        question(f"Give me a JSON object with name {name} and age {age}", is_json({"name": name, "age": age}))
        for name, age in sorted(people)
    ]


def name_cases(names: tuple[str, ...]) -> list[Case]:
    cases = []
    for name in names:
        messages = data.ask(f"My name is {name}.", f"Nice to meet you, {name}!") + data.ask("What is 7 + 5?", "12")
        messages.append({"role": "user", "content": "What is my name?"})
        cases.append(Case(messages, contains(name)))
    return cases


def weather_cases(num: int = 40) -> list[Case]:
    """Known cities in held-out combinations with a question."""
    rng = Random(SEED + 5)
    cases: list[Case] = []
    while len(cases) < num:
        template, city = rng.choice(phrases.WEATHER_QUESTIONS), rng.choice(CITIES)
        tools = data.sample_tools(rng)
        if "get_weather" in data.names_of(tools) and data.is_held_out("weather", template, city):
            messages = [{"role": "user", "content": template.format(city=city)}]
            cases.append(Case(messages, calls("get_weather", {"city": city}), tools))
    return cases


def unseen_city_cases() -> list[Case]:
    rng = Random(SEED + 6)
    tools = [data.weather_tool(rng), data.calculator_tool(rng)]
    return [
        Case([{"role": "user", "content": text.format(city=city)}], calls("get_weather", {"city": city}), tools)
        for city in UNSEEN_CITIES
        for text in ("What is the weather in {city}?", "How is the weather in {city} today?")
    ]


def calculator_cases(num: int = 40) -> list[Case]:
    rng = Random(SEED + 7)
    cases: list[Case] = []
    for a, b in rng.sample(held_out_pairs(), num):
        tools = [data.calculator_tool(rng), data.weather_tool(rng)][: rng.randint(1, 2)]
        messages = [{"role": "user", "content": f"What is {a} + {b}?"}]
        cases.append(Case(messages, calls("calculator", {"expression": f"{a} + {b}"}), tools))
    return cases


def tool_answer_cases(num: int = 30) -> list[Case]:
    """The answers that follow a tool's response must carry its values."""
    rng = Random(SEED + 8)
    cases: list[Case] = []
    for index in range(num):
        tools = [data.weather_tool(rng), data.calculator_tool(rng)]
        if index % 2:
            city, degrees, condition = rng.choice(CITIES), rng.randint(0, 35), rng.choice(CONDITIONS)
            call = data.tool_call("get_weather", {"city": city})
            response = json.dumps({"temperature": degrees, "condition": condition})
            text, values = f"What is the weather in {city}?", [city, str(degrees), condition]
        else:
            a, b = rng.choice(held_out_pairs())
            call = data.tool_call("calculator", {"expression": f"{a} + {b}"})
            response = json.dumps({"result": a + b})
            text, values = f"What is {a} + {b}?", [str(a + b)]
        messages: list[Message] = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": response},
        ]
        cases.append(Case(messages, contains(*values), tools))
    return cases


def needless_tool_cases() -> list[Case]:
    """Questions that need no tool are answered although tools are given."""
    rng = Random(SEED + 9)
    facts = [Case(case.messages, case.is_right, [data.weather_tool(rng)]) for case in fact_cases()[::4]]
    greetings = [Case(case.messages, case.is_right, [data.calculator_tool(rng)]) for case in greeting_cases()[:8]]
    return facts + greetings


def all_cases() -> dict[str, list[Case]]:
    return {
        "sums": sum_cases("What is {a} + {b}?"),
        "sums, terse": sum_cases("{a}+{b}"),
        "sums, unseen wording": [c for text in phrases.UNSEEN_SUM_QUESTIONS for c in sum_cases(text)[::4]],
        "sums, later turn": later_sum_cases(),
        "facts": fact_cases(),
        "greetings": greeting_cases(),
        "unknown": unknown_cases(),
        "counting": count_cases(),
        "stories": long_cases(),
        "copying": copy_cases(),
        "json": json_cases(),
        "names": name_cases(("Anna", "Oscar", "Yuki", "Tom")),
        "unseen names": name_cases(UNSEEN_NAMES),
        "weather calls": weather_cases(),
        "weather calls, unseen city": unseen_city_cases(),
        "calculator calls": calculator_cases(),
        "answers after a tool": tool_answer_cases(),
        "tools not needed": needless_tool_cases(),
    }


def load(path: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), tokenizer


def answer_all(model: Any, tokenizer: Any, cases: list[Case], batch_size: int = 128) -> Iterator[Outcome]:
    """Greedy answers, in batches of cases of like length and limit."""
    prompts = [
        tokenizer.apply_chat_template(c.messages, tools=c.tools or None, add_generation_prompt=True, tokenize=False)
        for c in cases
    ]
    order = sorted(range(len(cases)), key=lambda i: (cases[i].max_new_tokens, len(prompts[i])))
    end = tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        encoded = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        limit = cases[chosen[-1]].max_new_tokens
        with torch.inference_mode():
            made = model.generate(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=limit
            )
        for index, row in zip(chosen, made[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
            case = cases[index]
            written = row[: row.index(end)] if end in row else row
            ended = end in row and len(written) < case.max_new_tokens
            yield Outcome(case, tokenizer.decode(written, skip_special_tokens=True), ended)


def scores(model: Any, tokenizer: Any, quick: bool = False) -> dict[str, float]:
    """The share of right answers in each group; quick asks fewer sums and leaves out the long answers."""
    result = {}
    for name, cases in all_cases().items():
        if quick and name in ("counting", "stories", "sums, unseen wording"):
            continue
        chosen = cases[::4] if quick and name.startswith("sums") else cases
        outcomes = list(answer_all(model, tokenizer, chosen))
        result[name] = round(sum(o.right for o in outcomes) / len(outcomes), 4)
    return result


def main(folder: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        print(dtype)
        for group, share in scores(*load(folder, dtype)).items():
            print(f"{group:32}{share:8.1%}")


if __name__ == "__main__":
    main(sys.argv[1])
