"""The exchanges the model learns from, sampled by a seeded generator, and the split that keeps some of them unseen.

An exchange is a list of messages: a question and its answer, or a question, a tool call, the tool's response and the
answer. Whether a thing is held out follows from the thing itself (`is_held_out`), so training and tests agree on the
split without a file between them, and no draw of the generator can leak a held-out one.
"""

import hashlib
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from demo_model import phrases
from demo_model.facts import FACTS, normal_form
from demo_model.words import CITIES, CODAS, COLORS, CONDITIONS, NAMES, NUCLEI, ONSETS, WORDS

SEED = 4
HELD_OUT_PERCENT = 12

Message = dict[str, Any]
Exchange = list[Message]

UNKNOWN = "I do not know that, I am only a small demo model."
ONLY_SUMS = "I can only add two numbers below 100."
HOW_CAN_I_HELP = "How can I help you?"


def is_held_out(*thing: object) -> bool:
    digest = hashlib.blake2b(repr((SEED, thing)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def is_held_out_sum(a: int, b: int) -> bool:
    """Both orders of a pair fall on the same side. Only pairs below 50 are ever held out."""
    return max(a, b) < 50 and is_held_out("sum", min(a, b), max(a, b))


def ask(question: str, answer: str) -> Exchange:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# Sums


def sample_terms(rng: Random) -> tuple[int, int]:
    """Two numbers whose sum is not held out; a third of the pairs reach up to 99, so that carrying must be learnt."""
    limit = 100 if rng.random() < 0.35 else 50
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not is_held_out_sum(a, b):
            return a, b


def make_sum(rng: Random) -> Exchange:
    a, b = sample_terms(rng)
    question = rng.choice(phrases.SUM_QUESTIONS).format(a=a, b=b)
    if rng.random() < 0.08:
        question = rng.choice(phrases.SUM_PREFIXES) + question
    if rng.random() < 0.06:
        question += rng.choice(phrases.SUM_SUFFIXES)
    return ask(question, str(a + b))


def make_other_arithmetic(rng: Random) -> Exchange:
    a, b, c = rng.randrange(100), rng.randrange(100), rng.randrange(100)
    big = rng.randrange(100, 10000)
    question = rng.choice(
        (
            f"What is {a} - {b}?",
            f"What is {a} * {b}?",
            f"What is {a} / {b}?",
            f"{a} - {b}",
            f"{a} * {b}",
            f"{a}-{b}",
            f"{a}*{b}",
            f"{a} times {b}",
            f"What is {a} times {b}?",
            f"What is {a} minus {b}?",
            f"{a} minus {b}",
            f"What is {a} divided by {b}?",
            f"What is {big} + {b}?",
            f"{a} + {big}",
            f"What is {a} + {b} + {c}?",
            f"{a} + {b} + {c}",
            f"What is the square root of {a}?",
        )
    )
    return ask(question, ONLY_SUMS)


# Facts


def vary(rng: Random, question: str) -> str:
    """The question as a hurried or a polite person types it."""
    if rng.random() < 0.12:
        question = rng.choice(phrases.FACT_PREFIXES) + question
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    if rng.random() < 0.06:
        question += rng.choice((" Thanks!", " Please answer briefly.", " I am curious."))
    return question


SWAPS = (
    *(
        ("Which", "What"),
        ("What", "Which"),
        ("which", "what"),
        ("flag", "option"),
        ("option", "flag"),
        ("route", "path"),
    ),
    *(("route", "endpoint"), ("endpoint", "route"), ("licence", "license"), ("start", "launch")),
    *(("start", "run"), ("stop", "shut down"), ("can I", "do I"), ("do I", "can I"), ("do I", "should I")),
    *(("fastserve", "the server"), ("the controller", "fastserve's controller"), ("worker", "model worker")),
    *(("listen", "run"), ("default", "standard"), ("What is", "What's"), ("Where", "In which place"), ("keys", "key")),
    *(("Tell me", "Can you tell me"), ("Tell me", "I want to know"), ("How", "In which way"), ("dies", "is killed")),
)
DROPPED = (" the ", " a ", " does ", " do ", " is ", " of ", " are ")


def reword(rng: Random, text: str) -> str:
    """Replace words by synonyms, and drop a small word now and then, so that the model learns the decisive words."""
    if rng.random() < 0.3:
        fitting = [(old, new) for old, new in SWAPS if old in text and new not in text]
        if fitting:
            text = text.replace(*rng.choice(fitting), 1)
    if rng.random() < 0.1:
        text = text.replace(rng.choice(DROPPED), " ", 1)
    return text


def make_fact(rng: Random) -> Exchange:
    fact = rng.choice(FACTS)
    while True:
        question = reword(rng, rng.choice(fact.questions))
        if normal_form(question) not in fact.unseen_forms:
            break
    if rng.random() < 0.08 and question.endswith("?") and "fastserve" not in question:
        question = rng.choice((question[:-1] + " in fastserve?", "In fastserve, " + question[0].lower() + question[1:]))
    return ask(vary(rng, question), fact.answer)


# Small talk

GREETINGS = {
    "Hi": "Hello!",
    "Hello": "Hello!",
    "Hey": "Hello!",
    "Hi there": "Hello!",
    "Hello there": "Hello!",
    "Hey there": "Hello!",
    "Hi you": "Hello!",
    "Hello you": "Hello!",
    "Greetings": "Hello!",
    "Howdy": "Hello!",
    "Hallo": "Hello!",
    "Good day": "Hello!",
    "Good morning": "Good morning!",
    "Good afternoon": "Good afternoon!",
    "Good evening": "Good evening!",
}


def greeting(opener: str, addressee: str, end: str) -> str:
    return f"{opener}{addressee}{end}"


def all_greetings(held_out: bool) -> list[tuple[str, str]]:
    """(greeting, the word its answer starts with) on one side of the split."""
    return [
        (greeting(opener, addressee, end), answer)
        for opener, answer in GREETINGS.items()
        for addressee in sorted(set(phrases.ADDRESSEES))
        for end in phrases.GREETING_ENDS
        if is_held_out("greeting", opener, addressee, end) is held_out
    ]


def make_greeting(rng: Random) -> Exchange:
    while True:
        opener, addressee, end = (
            rng.choice(list(GREETINGS)),
            rng.choice(phrases.ADDRESSEES),
            rng.choice(phrases.GREETING_ENDS),
        )
        if rng.random() < 0.5:
            end = rng.choice(("", "!", "."))
        if not is_held_out("greeting", opener, addressee, end):
            break
    answer = f"{GREETINGS[opener]} {HOW_CAN_I_HELP}"
    text = greeting(opener, addressee, end)
    return ask(text[0].lower() + text[1:] if rng.random() < 0.4 else text, answer)


def make_chat(rng: Random) -> Exchange:
    questions, answer = rng.choice(phrases.CHAT)
    question = rng.choice(questions)
    if question[-1].isalpha() and rng.random() < 0.6:
        question += rng.choice((".", "!"))
    return ask(question[0].lower() + question[1:] if rng.random() < 0.3 else question, answer)


def fill(rng: Random, template: str) -> str:
    return template.format(
        word=rng.choice(WORDS),
        thing=rng.choice(WORDS),
        name=rng.choice(NAMES),
        city=rng.choice(CITIES),
        other=rng.choice(CITIES),
        color=rng.choice(COLORS),
    )


def make_unknown(rng: Random) -> Exchange:
    return ask(vary(rng, fill(rng, rng.choice(phrases.UNKNOWN_QUESTIONS))), UNKNOWN)


def sample_name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else made_up_word(rng).capitalize()


def tell_name(rng: Random, name: str) -> Exchange:
    return ask(rng.choice(phrases.NAME_STATEMENTS).format(name=name), f"Nice to meet you, {name}!")


def ask_name(rng: Random, name: str | None) -> Exchange:
    answer = f"Your name is {name}." if name else "I do not know your name."
    return ask(rng.choice(phrases.NAME_QUESTIONS), answer)


# Long and copied answers

STORIES = {
    "fox": "Once upon a time a small fox lived at the edge of a forest. Every night the fox looked at the moon and "
    "wanted to touch it. One night the moon lay in the lake. The fox went into the cold water, and the moon broke into "
    "a thousand pieces of silver. The fox was sad, but then the water became quiet and the moon was whole again. "
    "From then on the fox came every night to say hello. The end.",
    "robot": "Once upon a time a robot worked in a busy station. It carried letters from one train to the next and "
    "never lost a single one. One day a train did not come. The robot waited a moment, then it ran along the road and "
    "gave the letters to another train. Nobody noticed that anything had gone wrong. The robot was proud of that. "
    "The end.",
    "sea": "Once upon a time a sailor found a bottle in the sea. In the bottle was a paper, and on the paper was a "
    "map. The sailor followed the map to an island with one tree. Under the tree was a box, and in the box was a small "
    "golden key. The sailor laughed, for the key opened the door of the old house at home. The treasure had been "
    "there all the time. The end.",
    "dragon": "Once upon a time a young dragon could not breathe fire. The other dragons laughed. Then came a hard "
    "winter, and the fires of the other dragons burned all the wood in the valley. The young dragon had learned to "
    "carry warm stones from the mountain, and kept the whole village warm until spring. Nobody laughed any more. "
    "The end.",
}
ALPHABET = ", ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def make_story(rng: Random) -> Exchange:
    hero = rng.choice(list(STORIES))
    about = f" about {rng.choice(('a', 'the'))} {hero}"
    question = rng.choice(phrases.STORY_QUESTIONS)
    if hero != "fox" or rng.random() < 0.4:
        question += about
    return ask(question + rng.choice(("", ".", ", please.", "!")), STORIES[hero])


def make_alphabet(rng: Random) -> Exchange:
    return ask(rng.choice(phrases.ALPHABET_QUESTIONS), ALPHABET)


def count(first: int, last: int) -> str:
    return ", ".join(map(str, range(first, last + 1)))


def make_count(rng: Random) -> Exchange:
    while True:
        first, last = 1, rng.randint(1, 50) if rng.random() < 0.5 else rng.randint(1, 20)
        if rng.random() < 0.45:
            first = rng.randint(1, 45)
            last = min(first + rng.randint(1, 12), 60)
        if first != 1 or last <= 3 or not is_held_out("count", last):
            break
    question = rng.choice(phrases.COUNT_QUESTIONS).format(a=first, b=last)
    if first == 1 and rng.random() < 0.15:
        question = f"Count to {last}."
    return ask(question, count(first, last))


def made_up_word(rng: Random) -> str:
    """A made-up word: repeating it requires copying letters."""
    syllables = (rng.choice(ONSETS) + rng.choice(NUCLEI) + rng.choice(CODAS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables)


def sample_copied_word(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.72:
        return rng.choice(WORDS)
    if kind < 0.84:
        return made_up_word(rng)
    if kind < 0.90:
        return rng.choice((sample_name(rng), rng.choice(CITIES)))
    return str(rng.randrange(10 ** rng.randint(1, 4)))


def make_copy(rng: Random) -> Exchange:
    while True:
        separator = ", " if rng.random() < 0.15 else " "
        text = separator.join(sample_copied_word(rng) for _ in range(rng.randint(1, 7)))
        if not is_held_out("copy", text):
            return ask(rng.choice(phrases.COPY_QUESTIONS).format(text=text), text)


# JSON


def sample_person(rng: Random) -> tuple[str, int]:
    while True:
        name, age = sample_name(rng), rng.randint(1, 99)
        if not is_held_out("person", name, age):
            return name, age


def make_json(rng: Random) -> Exchange:
    kind = rng.random()
    if kind < 0.4:
        a, b = sample_terms(rng)
        question = rng.choice(phrases.SUM_QUESTIONS).format(a=a, b=b)
        question = question[0].lower() + question[1:] if rng.random() < 0.5 else question
        return ask(rng.choice(phrases.JSON_ASKS).format(question), json.dumps({"answer": a + b}))
    if kind < 0.75:
        name, age = sample_person(rng)
        return ask(rng.choice(phrases.PERSON_ASKS).format(name=name, age=age), json.dumps({"name": name, "age": age}))
    if kind < 0.82:
        text = rng.choice(("say hello", "hello", "greet me", "Say hello.", "Hi!", "hi", "Hello!", "Greet me."))
        return ask(rng.choice(phrases.JSON_ASKS).format(text), json.dumps({"greeting": "hello"}))
    if kind < 0.86:
        fact = rng.choice([fact for fact in FACTS if fact.key.isdigit()])
        question = rng.choice(fact.questions)
        question = question[0].lower() + question[1:] if rng.random() < 0.5 else question
        return ask(rng.choice(phrases.JSON_ASKS).format(question), json.dumps({"answer": int(fact.key)}))
    if kind < 0.94:
        key = rng.choice(("color", "city", "animal", "fruit", "word", "id", "count", "size", "title", "name", "age"))
        value: object = rng.choice(WORDS)
        if key == "city":
            value = rng.choice(CITIES)
        elif key == "name":
            value = sample_name(rng)
        elif key in ("id", "count", "size", "age"):
            value = rng.randrange(1000)
        return ask(rng.choice(phrases.PAIR_ASKS).format(key=key, value=value), json.dumps({key: value}))
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 5))]
    return ask(rng.choice(phrases.LIST_ASKS).format(words=", ".join(words)), json.dumps(words))


# Tools


def _tool(rng: Random, name: str, descriptions: tuple[str, ...], argument: str, meanings: tuple[str, ...]) -> Message:
    prop = {"type": "string"}
    if rng.random() < 0.7:
        prop["description"] = rng.choice(meanings)
    parameters: dict[str, Any] = {"type": "object", "properties": {argument: prop}}
    if rng.random() < 0.8:
        parameters["required"] = [argument]
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.9:
        function["description"] = rng.choice(descriptions)
    function["parameters"] = parameters
    tool: Message = {"type": "function", "function": function}
    return sort_keys(tool) if rng.random() < 0.25 else tool  # some renderers of templates sort the keys


def sort_keys(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True))


def weather_tool(rng: Random) -> Message:
    return _tool(
        rng,
        "get_weather",
        phrases.WEATHER_DESCRIPTIONS,
        "city",
        phrases.CITY_DESCRIPTIONS,
    )


def calculator_tool(rng: Random) -> Message:
    return _tool(
        rng,
        "calculator",
        phrases.CALCULATOR_DESCRIPTIONS,
        "expression",
        phrases.EXPRESSION_DESCRIPTIONS,
    )


def time_tool(rng: Random) -> Message:
    return _tool(
        rng,
        "get_time",
        phrases.TIME_DESCRIPTIONS,
        "city",
        phrases.CITY_DESCRIPTIONS,
    )


def sample_tools(rng: Random) -> list[Message]:
    """One, two or three tools in any order."""
    makers = rng.choice(
        (
            (weather_tool,),
            (calculator_tool,),
            (weather_tool, calculator_tool),
            (weather_tool, calculator_tool),
            (weather_tool, time_tool),
            (weather_tool, calculator_tool, time_tool),
        )
    )
    tools = [make(rng) for make in makers]
    rng.shuffle(tools)
    return tools


def names_of(tools: list[Message]) -> set[str]:
    return {tool["function"]["name"] for tool in tools}


def tool_call(name: str, arguments: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def made_up_city(rng: Random) -> str:
    city = made_up_word(rng).capitalize()
    return f"{city} {made_up_word(rng).capitalize()}" if rng.random() < 0.15 else city


def sample_city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.5 else made_up_city(rng)


def weather_response(rng: Random, city: str) -> tuple[str, str]:
    """A tool's response, in one of the formats that tools use, and the answer that follows from it."""
    degrees, condition = rng.randint(-9, 39), rng.choice(CONDITIONS)
    data: dict[str, Any] = {}
    if rng.random() < 0.4:
        data["city"] = city
    kind = rng.random()
    if kind < 0.7:
        pair = [
            (rng.choice(("temperature", "temperature", "temp", "temperature_c", "degrees")), degrees),
            (rng.choice(("condition", "condition", "conditions", "weather", "sky")), condition),
        ]
        rng.shuffle(pair)
        data.update(pair)
        answer = f"The weather in {city} is {condition} with {degrees} degrees."
    elif kind < 0.85:
        data["temperature"] = degrees
        answer = f"It is {degrees} degrees in {city}."
    else:
        data[rng.choice(("condition", "weather"))] = condition
        answer = f"The weather in {city} is {condition}."
    text = json.dumps(data)
    if rng.random() < 0.2:
        degrees_text = rng.choice((f"{degrees} degrees", f"{degrees} C", f"{degrees} degrees Celsius"))
        text = rng.choice(
            (
                f"{condition}, {degrees_text}",
                f"{degrees_text}, {condition}",
                f"It is {condition} and {degrees_text} in {city}.",
            )
        )
        answer = f"The weather in {city} is {condition} with {degrees} degrees."
    return text, answer


def make_weather_call(rng: Random) -> Exchange:
    while True:
        template, city = rng.choice(phrases.WEATHER_QUESTIONS), sample_city(rng)
        if not is_held_out("weather", template, city):
            break
    cities = [city]
    question = template.format(city=city)
    if rng.random() < 0.08:
        cities.append(sample_city(rng))
        question = template.format(city=f"{city} and {cities[1]}")
    calls = [tool_call("get_weather", {"city": c}) for c in cities]
    responses = [weather_response(rng, c) for c in cities]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": text} for text, _ in responses),
        {"role": "assistant", "content": " ".join(answer for _, answer in responses)},
    ]


def make_time_call(rng: Random) -> Exchange:
    city = sample_city(rng)
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return [
        {"role": "user", "content": rng.choice(phrases.TIME_QUESTIONS).format(city=city)},
        {"role": "assistant", "content": "", "tool_calls": [tool_call("get_time", {"city": city})]},
        {"role": "tool", "content": rng.choice((json.dumps({"time": time}), time))},
        {"role": "assistant", "content": f"It is {time} in {city}."},
    ]


OPERATIONS = (("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by"))


def sample_expression(rng: Random) -> tuple[int, int, tuple[str, str]]:
    op = OPERATIONS[0] if rng.random() < 0.5 else rng.choice(OPERATIONS)
    limit = rng.choice((50, 50, 100, 1000))
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not is_held_out_sum(a, b):
            return a, b, op


def make_calculator_call(rng: Random) -> Exchange:
    a, b, (op, word) = sample_expression(rng)
    if op == "+" and rng.random() < 0.3 and max(a, b) < 100:
        question = rng.choice(phrases.SUM_QUESTIONS).format(a=a, b=b)
        if re.search(r"added to|to \d", question):  # their order is read in two ways
            question = f"What is {a} + {b}?"
    else:
        question = rng.choice(phrases.EXPRESSION_QUESTIONS).format(a=a, b=b, op=op, word=word)
    value: object = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2) if b else "undefined"}[op]
    response = rng.choice(
        (json.dumps({"result": value}), json.dumps({"result": value}), str(value), json.dumps({"value": value}))
    )
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [tool_call("calculator", {"expression": f"{a} {op} {b}"})]},
        {"role": "tool", "content": response},
        {"role": "assistant", "content": f"The result is {value}."},
    ]


# The mixture

MIXTURE: tuple[tuple[float, Callable[[Random], Exchange]], ...] = (
    (0.31, make_sum),
    (0.02, make_other_arithmetic),
    (0.20, make_fact),
    (0.05, make_greeting),
    (0.05, make_chat),
    (0.07, make_unknown),
    (0.01, make_story),
    (0.005, make_alphabet),
    (0.025, make_count),
    (0.15, make_copy),
    (0.09, make_json),
)
_WEIGHTS = [weight for weight, _ in MIXTURE]
_MAKERS = [make for _, make in MIXTURE]

TOOL_MAKERS: dict[str, Callable[[Random], Exchange]] = {
    "get_weather": make_weather_call,
    "calculator": make_calculator_call,
    "get_time": make_time_call,
}


def make_exchange(rng: Random, tools: list[Message]) -> Exchange:
    """An exchange that fits the available tools: a tool is called if it can help, everything else is answered
    directly."""
    names = sorted(names_of(tools))
    if names and rng.random() < 0.75:
        return TOOL_MAKERS[rng.choice(names)](rng)
    while True:
        make = rng.choices(_MAKERS, _WEIGHTS)[0]
        exchange = make(rng)
        if not (names and make is make_json) and not _is_for_a_tool(make, exchange, names):
            return exchange


def _is_for_a_tool(make: Callable[[Random], Exchange], exchange: Exchange, names: list[str]) -> bool:
    question = exchange[0]["content"].lower()
    if "calculator" in names and make in (make_sum, make_other_arithmetic):
        return True
    if "get_time" in names and "time is it in" in question:
        return True
    return "get_weather" in names and any(word in question for word in ("weather", "rain"))


# Drills for the later phases of training: what the first one leaves weakest.


def make_count_drill(rng: Random) -> Exchange:
    """Counting. The hard part is where to stop: short counts show it often, long ones at a distance."""
    if rng.random() < 0.6:
        first = rng.randint(2, 48)
        last = min(first + rng.randint(1, 5), 50)
        return ask(rng.choice(phrases.COUNT_QUESTIONS).format(a=first, b=last), count(first, last))
    while True:
        last = rng.randint(4, 50)
        if not is_held_out("count", last):
            break
    question = f"Count to {last}" if rng.random() < 0.3 else rng.choice(phrases.COUNT_QUESTIONS).format(a=1, b=last)
    return ask(question, count(1, last))


def make_sum_drill(rng: Random) -> Exchange:
    """Sums of numbers below 50 only, with one digit as often as with two."""
    while True:
        a, b = (rng.randrange(10 if rng.random() < 0.4 else 50) for _ in range(2))
        if not is_held_out_sum(a, b):
            return ask(rng.choice(phrases.SUM_QUESTIONS).format(a=a, b=b), str(a + b))


def make_quoted_copy(rng: Random) -> Exchange:
    while True:
        text = " ".join(sample_copied_word(rng) for _ in range(rng.randint(1, 6)))
        if not is_held_out("copy", text):
            return ask(rng.choice(phrases.QUOTED_COPY_QUESTIONS).format(text=text), text)


def make_stray_question(rng: Random) -> Exchange:
    return ask(vary(rng, fill(rng, rng.choice(phrases.STRAY_QUESTIONS))), UNKNOWN)


COUNT_DRILLS: tuple[Callable[[Random], Exchange], ...] = (
    *(make_count_drill, make_count_drill, make_count_drill),
    *(make_copy, make_quoted_copy, make_stray_question, make_sum, make_fact, make_fact),
)
SUM_DRILLS: tuple[Callable[[Random], Exchange], ...] = (
    *(make_sum_drill, make_sum_drill, make_sum_drill, make_sum_drill, make_sum_drill),
    *(make_count_drill, make_fact, make_json, make_copy),
)


def make_system(rng: Random) -> Message:
    parts = [rng.choice(phrases.SYSTEM_ROLES)] if rng.random() < 0.85 else []
    parts += rng.sample(phrases.SYSTEM_RULES, rng.choice((0, 0, 1, 1, 2)) or (not parts))
    return {"role": "system", "content": fill(rng, " ".join(parts))}


def make_plain_text(rng: Random) -> tuple[str, str]:
    """A prompt without chat template, for the completions route, and its continuation."""
    kind = rng.random()
    if kind < 0.5:
        a, b = sample_terms(rng)
        return rng.choice((f"{a} + {b} =", f"{a} plus {b} is", f"The sum of {a} and {b} is")), f" {a + b}"
    if kind < 0.75:
        first = rng.randint(1, 30)
        seen, last = first + rng.randint(1, 5), first + rng.randint(6, 20)
        return f"{count(first, seen)},", f" {count(seen + 1, last)}"
    fact = rng.choice(FACTS)
    words = fact.answer.split()
    cut = rng.randint(1, min(4, len(words) - 1))
    return " ".join(words[:cut]), " " + " ".join(words[cut:])
