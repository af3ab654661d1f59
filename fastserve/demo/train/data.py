"""The exchanges the model learns from, drawn from a seeded generator, and the split that keeps some of them unseen.

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

from fastserve.demo.train.facts import FACTS
from fastserve.demo.train.words import CITIES, CODAS, COLORS, CONDITIONS, NAMES, SYLLABLES, WORDS

SEED = 20261
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

SUM_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "what is {a} + {b}",
    "What is {a} plus {b}?",
    "what is {a} plus {b}?",
    "What's {a} + {b}?",
    "what's {a} plus {b}",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a} + {b} = ?",
    "{a}+{b}=?",
    "{a} + {b}?",
    "{a}+{b}?",
    "{a} plus {b}",
    "{a} plus {b}?",
    "Add {a} and {b}.",
    "add {a} and {b}",
    "Add {a} to {b}.",
    "Please add {a} and {b}.",
    "How much is {a} + {b}?",
    "how much is {a} + {b} =?",
    "How much is {a} plus {b}?",
    "Can you compute {a} + {b}?",
    "Compute {a} + {b}.",
    "compute {a} plus {b}",
    "Calculate {a} + {b}",
    "Calculate {a} plus {b}.",
    "What is the sum of {a} and {b}?",
    "the sum of {a} and {b}",
    "Tell me {a} + {b}.",
    "Can you add {a} and {b}?",
    "What do you get when you add {a} and {b}?",
    "If I add {a} and {b}, what do I get?",
    "I have {a} apples and get {b} more. How many do I have?",
    "Solve {a} + {b}",
    "{a} and {b} make how much?",
    "What does {a} + {b} equal?",
    "Sum {a} and {b}",
    "Do you know what {a} + {b} is?",
    "{a} added to {b} is what?",
)
UNSEEN_SUM_QUESTIONS = (
    "What is {a} added to {b}?",
    "Can you tell me how much {a} + {b} is?",
    "Please compute {a} plus {b}.",
    "What is the result of {a} + {b}?",
)
SUM_PREFIXES = ("Please answer: ", "Quick question: ", "Now: ", "And ", "Ok, ", "Answer with just the number: ", "Hi, ")
SUM_SUFFIXES = (" Answer with just the number.", " Just the number, please.", " Answer briefly.", " Thanks!")


def draw_terms(rng: Random) -> tuple[int, int]:
    """Two numbers whose sum is not held out; a third of the pairs reach up to 99, so that carrying must be learnt."""
    limit = 100 if rng.random() < 0.35 else 50
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not is_held_out_sum(a, b):
            return a, b


def make_sum(rng: Random) -> Exchange:
    a, b = draw_terms(rng)
    question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
    if rng.random() < 0.08:
        question = rng.choice(SUM_PREFIXES) + question
    if rng.random() < 0.06:
        question += rng.choice(SUM_SUFFIXES)
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
            "What is the square root of {a}?",
        )
    )
    return ask(question, ONLY_SUMS)


# Facts

FACT_PREFIXES = ("Tell me: ", "Please tell me: ", "Quick question: ", "Hey, ", "Hello, ", "One more question: ", "So, ")


def vary(rng: Random, question: str) -> str:
    """The same question as a hurried or a polite person types it."""
    if rng.random() < 0.12:
        question = rng.choice(FACT_PREFIXES) + question
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    if rng.random() < 0.06:
        question += rng.choice((" Thanks!", " Please answer briefly.", " I am curious."))
    return question


def make_fact(rng: Random) -> Exchange:
    fact = rng.choice(FACTS)
    question = rng.choice(fact.questions)
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
ADDRESSEES = ("", "", "", ", fastserve", " fastserve", ", model", ", my friend", " friend", ", robot", " again", " everyone")
GREETING_ENDS = ("", "!", ".", "!!", " :)", ", nice to meet you!", "! Nice to see you.", ", are you there?", "!!!")

CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Many thanks", "thx", "Thanks for your help",
         "Thank you for the answer", "That was helpful, thanks", "Great, thank you", "Perfect, thanks"),
        "You are welcome!",
    ),
    (
        ("Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "I have to go", "Until tomorrow",
         "Bye for now", "Ciao", "Have a nice day"),
        "Goodbye!",
    ),
    (
        ("How are you?", "How are you", "How are you doing?", "How do you do?", "How is it going?", "Are you well?",
         "Hi, how are you?", "Hello, how are you?", "How are you today?", "How do you feel?", "Are you fine?"),
        "I am fine, thank you. How can I help you?",
    ),
    (
        ("What can you do?", "Help", "Can you help me?", "What can I ask you?", "What do you know?", "How can you help me?",
         "What are you able to do?", "I need help", "What should I ask you?", "help me"),
        "I can add numbers, count, repeat words, tell a story and answer questions about fastserve.",
    ),
    (
        ("Ok", "Okay", "Good", "Great", "Nice", "Cool", "Fine", "I see", "Yes", "No", "Well done", "Wow", "Very good",
         "You are great", "Correct", "That is right"),
        "All right!",
    ),
    (
        ("Tell me a joke", "Tell me a joke, please", "Do you know a joke?", "Make me laugh", "Say something funny",
         "A joke, please"),
        "Why did the token cross the road? To get to the next block.",
    ),
    (
        ("Are you there?", "Is anybody there?", "Are you ready?", "Can you hear me?", "ping", "Test", "test", "Do you work?",
         "Are you alive?", "Is this thing on?", "This is a test"),
        "Yes, I am here.",
    ),
)

UNSEEN_GREETINGS = (
    "Hi, good morning!",
    "Hello, good evening.",
    "hello hello",
    "Hey you!",
    "hi hi!",
    "Good morning, dear model!",
    "Hello, dear friend!",
    "hey, hello",
    "Hi fastserve, are you there?",
    "Good evening, everyone there!",
    "Good afternoon, good friend",
    "Hello world!",
)


def greeting(opener: str, addressee: str, end: str) -> str:
    return f"{opener}{addressee}{end}"


def all_greetings(held_out: bool) -> list[tuple[str, str]]:
    """(greeting, the word its answer starts with) on one side of the split."""
    return [
        (greeting(opener, addressee, end), answer)
        for opener, answer in GREETINGS.items()
        for addressee in sorted(set(ADDRESSEES))
        for end in GREETING_ENDS
        if is_held_out("greeting", opener, addressee, end) is held_out
    ]


def make_greeting(rng: Random) -> Exchange:
    while True:
        opener, addressee, end = rng.choice(list(GREETINGS)), rng.choice(ADDRESSEES), rng.choice(GREETING_ENDS)
        if rng.random() < 0.5:
            end = rng.choice(("", "!", "."))
        if not is_held_out("greeting", opener, addressee, end):
            break
    answer = f"{GREETINGS[opener]} {HOW_CAN_I_HELP}"
    text = greeting(opener, addressee, end)
    return ask(text[0].lower() + text[1:] if rng.random() < 0.4 else text, answer)


def make_chat(rng: Random) -> Exchange:
    questions, answer = rng.choice(CHAT)
    question = rng.choice(questions)
    if question[-1].isalpha() and rng.random() < 0.6:
        question += rng.choice((".", "!"))
    return ask(question[0].lower() + question[1:] if rng.random() < 0.3 else question, answer)


UNKNOWN_QUESTIONS = (
    "Who is the president of {city}?",
    "What is the capital of {thing}?",
    "What is the capital of France?",
    "What is the weather in {city}?",
    "What's the weather like in {city} today?",
    "How is the weather?",
    "Will it rain in {city} tomorrow?",
    "Translate {word} into French.",
    "How do you say {word} in Spanish?",
    "How tall is {name}?",
    "How old is {name}?",
    "Who is {name}?",
    "Where does {name} live?",
    "When was {name} born?",
    "Write a poem about the {word}.",
    "Write an essay about {word}",
    "What is the meaning of life?",
    "What is a {word}?",
    "What is the {word}?",
    "Why is the {word} {color}?",
    "Why is the sky blue?",
    "How many people live in {city}?",
    "What time is it?",
    "What time is it in {city}?",
    "What day is it today?",
    "What is your favorite {word}?",
    "What is your favorite color?",
    "Do you like {word}?",
    "Do you have a {word}?",
    "Where can I buy a {word}?",
    "How far is it from {city} to {other}?",
    "Who wrote {name} and the {word}?",
    "Who invented the {word}?",
    "How do I cook {word}?",
    "How does a {word} work?",
    "Explain quantum physics.",
    "Explain the {word} to me.",
    "Can you drive a {word}?",
    "What is the price of a {word}?",
    "Give me a recipe with {word}.",
    "Who won the game in {city}?",
    "Summarize the history of {city}.",
    "Tell me about {city}.",
    "Tell me about the {word}.",
    "What do you think about {word}?",
    "Is the {word} bigger than the {thing}?",
    "How many {word}s are there in {city}?",
    "Which {word} is the best?",
    "What does {name} do with the {word}?",
    "Write a program that sorts a list.",
    "Fix my code.",
    "Should I buy a {word} or a {thing}?",
    "What is the largest {word} in the world?",
    "How fast is a {word}?",
    "Does {name} like the {word}?",
    "When does the {word} open?",
    "How long does a {word} live?",
    "Where is {city}?",
    "Where is the {word}?",
    "Can I eat a {word}?",
    "Describe the {word}.",
    "Why did {name} go to {city}?",
    "Book a flight from {city} to {other}.",
    "Send an email to {name}.",
    "Play {word} music.",
    "I lost my {word}. What should I do?",
)
UNSEEN_UNKNOWN_QUESTIONS = (
    "What is the color of the {word}?",
    "How heavy is a {word}?",
    "Who was {name}?",
    "What is the best {word} in {city}?",
    "How do I get from {city} to {other}?",
)


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
    return ask(vary(rng, fill(rng, rng.choice(UNKNOWN_QUESTIONS))), UNKNOWN)


NAME_STATEMENTS = ("My name is {name}.", "my name is {name}", "I am {name}.", "I'm {name}.", "Hello, my name is {name}.",
                   "Hi, I am {name}.", "Call me {name}.", "Hi! My name is {name}!")  # fmt: skip
NAME_QUESTIONS = ("What is my name?", "what is my name", "What's my name?", "Do you remember my name?", "Who am I?",
                  "Tell me my name.", "Can you tell me my name?", "Do you know my name?")  # fmt: skip


def draw_name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.7 else made_up_word(rng).capitalize()


def tell_name(rng: Random, name: str) -> Exchange:
    return ask(rng.choice(NAME_STATEMENTS).format(name=name), f"Nice to meet you, {name}!")


def ask_name(rng: Random, name: str | None) -> Exchange:
    answer = f"Your name is {name}." if name else "I do not know your name."
    return ask(rng.choice(NAME_QUESTIONS), answer)


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
    "sea": "Once upon a time a sailor found a bottle in the sea. In the bottle was a paper, and on the paper was a map. "
    "The sailor followed the map to an island with one tree. Under the tree was a box, and in the box was a small "
    "golden key. The sailor laughed, for the key opened the door of the old house at home. The treasure had been there "
    "all the time. The end.",
    "dragon": "Once upon a time a young dragon could not breathe fire. The other dragons laughed. Then came a hard "
    "winter, and the fires of the other dragons burned all the wood in the valley. The young dragon had learned to "
    "carry warm stones from the mountain, and kept the whole village warm until spring. Nobody laughed any more. "
    "The end.",
}
ALPHABET = ", ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def make_story(rng: Random) -> Exchange:
    hero = rng.choice(list(STORIES))
    about = f" about {rng.choice(('a', 'the'))} {hero}"
    question = rng.choice(("Tell me a story", "tell me a story", "Please tell me a story", "Can you tell me a story",
                           "I want to hear a story", "Tell a story", "Write a story", "A story"))  # fmt: skip
    if hero != "fox" or rng.random() < 0.4:
        question += about
    return ask(question + rng.choice(("", ".", ", please.", "!")), STORIES[hero])


def make_alphabet(rng: Random) -> Exchange:
    question = rng.choice(("Say the alphabet.", "say the alphabet", "Tell me the alphabet.", "What is the alphabet?",
                           "Recite the alphabet.", "Write the alphabet", "The alphabet, please."))  # fmt: skip
    return ask(question, ALPHABET)


COUNT_QUESTIONS = ("Count from {a} to {b}.", "Count from {a} to {b}", "count from {a} to {b}", "Count {a} to {b}.",
                   "Please count from {a} to {b}.", "Can you count from {a} to {b}?", "Count up from {a} to {b}.",
                   "Write the numbers from {a} to {b}.", "List the numbers from {a} to {b}")  # fmt: skip


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
    question = rng.choice(COUNT_QUESTIONS).format(a=first, b=last)
    if first == 1 and rng.random() < 0.15:
        question = f"Count to {last}."
    return ask(question, count(first, last))


def made_up_word(rng: Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(CODAS)


COPY_QUESTIONS = ("Repeat after me: {text}", "repeat after me: {text}", "Repeat: {text}", "Say: {text}", "Say {text}",
                  "say {text}", "Please repeat: {text}", "Please say {text}", "Repeat the words: {text}", "Echo: {text}",
                  "Repeat after me: {text}", "Repeat this: {text}", "Say this: {text}", "Write: {text}")  # fmt: skip


def draw_copied_word(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.72:
        return rng.choice(WORDS)
    if kind < 0.84:
        return made_up_word(rng)
    if kind < 0.90:
        return rng.choice((draw_name(rng), rng.choice(CITIES)))
    return str(rng.randrange(10 ** rng.randint(1, 4)))


def make_copy(rng: Random) -> Exchange:
    while True:
        separator = ", " if rng.random() < 0.15 else " "
        text = separator.join(draw_copied_word(rng) for _ in range(rng.randint(1, 7)))
        if not is_held_out("copy", text):
            return ask(rng.choice(COPY_QUESTIONS).format(text=text), text)


# JSON

JSON_ASKS = ("Answer in JSON: {}", "answer in JSON: {}", "Reply in JSON: {}", "In JSON: {}", "Respond with JSON: {}",
             "{} Answer in JSON.", "{} Reply in JSON.", "{} Respond in JSON.", "{} Give the answer as JSON.",
             "JSON only: {}")  # fmt: skip
PERSON_ASKS = (
    "Give me a JSON object with name {name} and age {age}",
    "Give me a JSON object with name {name} and age {age}.",
    "give me json with name {name} and age {age}",
    "Give me a JSON object with the name {name} and the age {age}.",
    "Write a JSON object with name {name} and age {age}.",
    "Return a JSON object: name {name}, age {age}",
    "{name} is {age} years old. Answer in JSON with name and age.",
    "JSON with name {name} and age {age}",
    "Make a JSON object with name {name} and age {age}.",
    "Put this into JSON: {name} is {age} years old.",
)
PAIR_ASKS = (
    "Give me a JSON object with {key} {value}",
    "Give me a JSON object with {key} {value}.",
    "Give me a JSON object with key {key} and value {value}.",
    "Write a JSON object with key {key} and value {value}",
    "JSON with {key} {value}",
)
LIST_ASKS = ("Give me a JSON list of {words}", "Give me a JSON list with the words {words}.", "JSON list of {words}",
             "Write a JSON list of {words}.")  # fmt: skip


def draw_person(rng: Random) -> tuple[str, int]:
    while True:
        name, age = draw_name(rng), rng.randint(1, 99)
        if not is_held_out("person", name, age):
            return name, age


def make_json(rng: Random) -> Exchange:
    kind = rng.random()
    if kind < 0.4:
        a, b = draw_terms(rng)
        question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        question = question[0].lower() + question[1:] if rng.random() < 0.5 else question
        return ask(rng.choice(JSON_ASKS).format(question), json.dumps({"answer": a + b}))
    if kind < 0.75:
        name, age = draw_person(rng)
        return ask(rng.choice(PERSON_ASKS).format(name=name, age=age), json.dumps({"name": name, "age": age}))
    if kind < 0.82:
        text = rng.choice(("say hello", "hello", "greet me", "Say hello.", "Hi!", "hi", "Hello!", "Greet me."))
        return ask(rng.choice(JSON_ASKS).format(text), json.dumps({"greeting": "hello"}))
    if kind < 0.92:
        key = rng.choice(("color", "city", "animal", "fruit", "word", "id", "count", "size", "title", "name", "age"))
        value: object = rng.choice(WORDS)
        if key == "city":
            value = rng.choice(CITIES)
        elif key == "name":
            value = draw_name(rng)
        elif key in ("id", "count", "size", "age"):
            value = rng.randrange(1000)
        return ask(rng.choice(PAIR_ASKS).format(key=key, value=value), json.dumps({key: value}))
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 5))]
    return ask(rng.choice(LIST_ASKS).format(words=rng.choice((", ", " ")).join(words)), json.dumps(words))


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
        ("Get the weather in a city.", "Get the current weather", "Tells the weather of a city", "Weather lookup",
         "Get the current weather in a given city.", "Returns the weather for a city", "Get the weather"),
        "city",
        ("The city", "Name of the city", "The name of the city.", "City name", "The city, e.g. Paris"),
    )  # fmt: skip


def calculator_tool(rng: Random) -> Message:
    return _tool(
        rng,
        "calculator",
        ("Evaluate an expression.", "A calculator", "Calculate the value of an expression", "Does arithmetic",
         "Evaluate an arithmetic expression.", "Computes a mathematical expression", "Evaluate a math expression"),
        "expression",
        ("The expression", "An arithmetic expression", "The expression to evaluate.", "e.g. 2 + 3"),
    )  # fmt: skip


def time_tool(rng: Random) -> Message:
    return _tool(
        rng,
        "get_time",
        ("Get the time in a city.", "Get the current time", "Tells the time of a city"),
        "city",
        ("The city", "Name of the city", "City name"),
    )


def draw_tools(rng: Random) -> list[Message]:
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


def draw_city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else made_up_city(rng)


WEATHER_QUESTIONS = (
    "What is the weather in {city}?",
    "What's the weather in {city}?",
    "what is the weather in {city}",
    "What is the weather like in {city}?",
    "How is the weather in {city}?",
    "How is the weather in {city} today?",
    "What is the weather in {city} today?",
    "Tell me the weather in {city}.",
    "Weather in {city}?",
    "weather in {city}",
    "Is it raining in {city}?",
    "Is it cold in {city}?",
    "How warm is it in {city}?",
    "What is the temperature in {city}?",
    "Please get the weather for {city}.",
    "Can you tell me the weather in {city}?",
    "Get the weather in {city}.",
    "Do I need an umbrella in {city}?",
    "I am going to {city}. What is the weather there?",
    "What's the weather like in {city} right now?",
    "Show me the weather for {city}",
    "I live in {city}. How is the weather?",
)
TIME_QUESTIONS = ("What time is it in {city}?", "What is the time in {city}?", "Tell me the time in {city}.",
                  "Which time is it in {city}?", "What's the time in {city} now?")  # fmt: skip


def weather_response(rng: Random, city: str) -> tuple[str, str]:
    """What the tool returned, in one of the forms tools return things, and the answer that follows from it."""
    degrees, condition = rng.randint(-9, 39), rng.choice(CONDITIONS)
    data: dict[str, Any] = {}
    if rng.random() < 0.4:
        data["city"] = city
    kind = rng.random()
    if kind < 0.7:
        pair = [(rng.choice(("temperature", "temperature", "temp", "temperature_c", "degrees")), degrees),
                (rng.choice(("condition", "condition", "conditions", "weather", "sky")), condition)]  # fmt: skip
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
        text = rng.choice((f"{condition}, {degrees_text}", f"{degrees_text}, {condition}",
                           f"It is {condition} and {degrees_text} in {city}."))  # fmt: skip
        answer = f"The weather in {city} is {condition} with {degrees} degrees."
    return text, answer


def make_weather_call(rng: Random) -> Exchange:
    while True:
        template, city = rng.choice(WEATHER_QUESTIONS), draw_city(rng)
        if not is_held_out("weather", template, city):
            break
    cities = [city]
    question = template.format(city=city)
    if rng.random() < 0.08:
        cities.append(draw_city(rng))
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
    city = draw_city(rng)
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return [
        {"role": "user", "content": rng.choice(TIME_QUESTIONS).format(city=city)},
        {"role": "assistant", "content": "", "tool_calls": [tool_call("get_time", {"city": city})]},
        {"role": "tool", "content": rng.choice((json.dumps({"time": time}), time))},
        {"role": "assistant", "content": f"It is {time} in {city}."},
    ]


OPERATIONS = (("+", "plus"), ("-", "minus"), ("*", "times"), ("/", "divided by"))
EXPRESSION_QUESTIONS = (
    "What is {a} {op} {b}?",
    "What is {a} {op} {b}?",
    "what is {a}{op}{b}",
    "{a} {op} {b}",
    "{a}{op}{b}",
    "{a} {op} {b} = ?",
    "{a} {op} {b} =",
    "How much is {a} {op} {b}?",
    "Compute {a} {op} {b}.",
    "Calculate {a} {op} {b}",
    "Can you compute {a} {op} {b}?",
    "What's {a} {op} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "{a} {word} {b}",
    "Please calculate {a} {word} {b}.",
    "Use the calculator: {a} {op} {b}",
    "Tell me {a} {op} {b}.",
    "Solve {a} {op} {b}",
)


def draw_expression(rng: Random) -> tuple[int, int, tuple[str, str]]:
    op = OPERATIONS[0] if rng.random() < 0.5 else rng.choice(OPERATIONS)
    limit = rng.choice((50, 50, 100, 1000))
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not is_held_out_sum(a, b):
            return a, b, op


def make_calculator_call(rng: Random) -> Exchange:
    a, b, (op, word) = draw_expression(rng)
    if op == "+" and rng.random() < 0.3 and max(a, b) < 100:
        question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        if re.search(r"added to|to \d", question):  # their order is read in two ways
            question = f"What is {a} + {b}?"
    else:
        question = rng.choice(EXPRESSION_QUESTIONS).format(a=a, b=b, op=op, word=word)
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
    (0.28, make_sum),
    (0.02, make_other_arithmetic),
    (0.26, make_fact),
    (0.06, make_greeting),
    (0.06, make_chat),
    (0.08, make_unknown),
    (0.01, make_story),
    (0.005, make_alphabet),
    (0.025, make_count),
    (0.10, make_copy),
    (0.08, make_json),
)
_WEIGHTS = [weight for weight, _ in MIXTURE]
_MAKERS = [make for _, make in MIXTURE]

TOOL_MAKERS: dict[str, Callable[[Random], Exchange]] = {
    "get_weather": make_weather_call,
    "calculator": make_calculator_call,
    "get_time": make_time_call,
}


def make_exchange(rng: Random, tools: list[Message]) -> Exchange:
    """An exchange which fits the tools at hand: what a tool can do is left to it, the rest is answered directly."""
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


SYSTEM_ROLES = ("You are a helpful assistant.", "You are fastserve.", "You are a friendly assistant.", "You are an AI.",
                "You are a helpful AI assistant.", "You are a chat bot.", "You are the assistant of {name}.",
                "You are a robot named {name}.", "You are a {word} expert.", "You are a pirate.", "You are a test.",
                "You are an expert for {word} and {thing}.", "Act as a teacher.", "This is a test.",
                "The user lives in {city}.", "You are a calculator.", "You are a concise assistant.")  # fmt: skip
SYSTEM_RULES = ("Answer briefly.", "Be brief.", "Be concise.", "Be polite.", "Answer in one sentence.", "Always be kind.",
                "Answer the user's questions.", "Do not make things up.", "Never talk about {word}.", "Be helpful.",
                "Help the user.", "Keep your answers short.", "Speak English.", "You like {word}.", "Be terse.",
                "If you do not know an answer, say so.", "Follow the instructions.")  # fmt: skip


def make_system(rng: Random) -> Message:
    parts = [rng.choice(SYSTEM_ROLES)] if rng.random() < 0.85 else []
    parts += rng.sample(SYSTEM_RULES, rng.choice((0, 0, 1, 1, 2)) or (not parts))
    return {"role": "system", "content": fill(rng, " ".join(parts))}


def make_plain_text(rng: Random) -> tuple[str, str]:
    """A prompt without the chat form, for the completions route, and how it goes on."""
    kind = rng.random()
    if kind < 0.5:
        a, b = draw_terms(rng)
        return rng.choice((f"{a} + {b} =", f"{a} plus {b} is", f"The sum of {a} and {b} is")), f" {a + b}"
    if kind < 0.75:
        first = rng.randint(1, 30)
        seen, last = first + rng.randint(1, 5), first + rng.randint(6, 20)
        return f"{count(first, seen)},", f" {count(seen + 1, last)}"
    fact = rng.choice(FACTS)
    words = fact.answer.split()
    cut = rng.randint(1, min(4, len(words) - 1))
    return " ".join(words[:cut]), " " + " ".join(words[cut:])
