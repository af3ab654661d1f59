"""Chat templates by FastChat's names, for models that come without one.

Each is the format that a family of models was trained on, as a Jinja template, with the texts that end an answer beside
the model's own end token. A system message of the request replaces the default one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    source: str
    stops: tuple[str, ...] = ()


_ASSISTANT = (
    "This is a conversation between a person and an AI assistant. The assistant's answers are helpful and polite."
)
_EXPERT = "You are a helpful assistant."


def _with_system(default: str, body: str) -> str:
    """A template with `system` (the first message's content if it is a system message, else `default`) and `turns`."""
    return (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = " + repr(default) + " %}{% set turns = messages %}{% endif %}" + body
    )


def _colons(user: str, assistant: str, sep: str, sep2: str, default: str = _ASSISTANT) -> str:
    """Roles before colons: `user` and `assistant` with their separators after each turn."""
    return _with_system(
        default,
        "{{ system }}{% if system %}{{ " + repr(sep) + " }}{% endif %}"
        "{% for turn in turns %}"
        "{% if turn.role == 'assistant' %}{{ " + repr(f"{assistant}: ") + " + turn.content + " + repr(sep2) + " }}"
        "{% else %}{{ " + repr(f"{user}: ") + " + turn.content + " + repr(sep) + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + repr(f"{assistant}:") + " }}{% endif %}",
    )


def _marked(before: str, after: str, end: str, default: str = "", user: str = "user", begin: str = "") -> str:
    """Role names between marks, as in `<|im_start|>user\\n...<|im_end|>\\n`. `begin`: an expression
    written first."""

    def mark(role: str) -> str:
        return "{{ " + repr(before) + " + " + role + " + " + repr(after) + " }}"

    return ("{{ " + begin + " }}" if begin else "") + _with_system(
        default,
        "{% if system %}" + mark("'system'") + "{{ system + " + repr(end) + " }}{% endif %}"
        "{% for turn in turns %}"
        + mark(f"(turn.role if turn.role != 'user' else {user!r})")
        + "{{ turn.content + "
        + repr(end)
        + " }}{% endfor %}"
        "{% if add_generation_prompt %}" + mark("'assistant'") + "{% endif %}",
    )


_CHATML = NamedTemplate(_marked("<|im_start|>", "\n", "<|im_end|>\n", _EXPERT), ("<|im_end|>",))
_VICUNA = NamedTemplate(_colons("USER", "ASSISTANT", " ", "</s>"), ("</s>",))
_ZERO_SHOT = NamedTemplate(_colons("### Human", "### Assistant", "\n", "\n"), ("###",))
_ONE_SHOT = NamedTemplate(
    _colons(
        "### Human",
        "### Assistant",
        "\n",
        "\n",
        _ASSISTANT
        + "\n### Human: How do I keep bread fresh?\n### Assistant: Keep it in a paper bag or a bread box at room "
        "temperature, cut side down. What you will not eat within three days can be frozen in slices.",
    ),
    ("###",),
)
_LLAMA_2 = NamedTemplate(
    _with_system(
        "",
        "{% for turn in turns %}{% if turn.role == 'assistant' %}{{ ' ' + turn.content + ' ' + (eos_token or '') }}"
        "{% else %}{{ (bos_token or '') + '[INST] ' }}"
        "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ turn.content + ' [/INST]' }}{% endif %}{% endfor %}",
    )
)
_LLAMA_3 = NamedTemplate(
    _marked("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", begin="bos_token or ''"), ("<|eot_id|>",)
)
_MISTRAL = NamedTemplate(
    _with_system(
        "",
        "{{ bos_token or '' }}{% for turn in turns %}{% if turn.role == 'assistant' %}"
        "{{ ' ' + turn.content + (eos_token or '') }}"
        "{% else %}{{ '[INST] ' }}{% if loop.first and system %}{{ system + '\\n' }}{% endif %}"
        "{{ turn.content + ' [/INST]' }}{% endif %}{% endfor %}",
    )
)
_ALPACA = NamedTemplate(
    _colons(
        "### Instruction",
        "### Response",
        "\n\n",
        "</s>",
        "An instruction follows that describes a task. The response completes it as asked.",
    ),
    ("###", "</s>"),
)


def _rounds(first: int, gap: str) -> NamedTemplate:
    """Numbered rounds of question and answer (ChatGLM, ChatGLM2)."""
    return NamedTemplate(
        _with_system(
            "",
            "{% if system %}{{ system + " + repr(gap) + " }}{% endif %}"
            "{% set round = namespace(number=" + str(first) + ") %}"
            "{% for turn in turns %}{% if turn.role == 'assistant' %}{{ '\u7b54\uff1a' + turn.content + "
            + repr(gap)
            + " }}"
            "{% else %}{{ '[Round ' + round.number|string + ']"
            + gap.replace("\n", "\\n")
            + "\u95ee\uff1a' + turn.content + "
            + repr(gap)
            + " }}{% set round.number = round.number + 1 %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\u7b54\uff1a' }}{% endif %}",
        )
    )


_CHATGLM_3 = NamedTemplate(_marked("<|", "|>\n ", ""), ("<|user|>", "<|observation|>"))
_BAICHUAN_2 = NamedTemplate(
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ turn.content }}"
    "{% elif turn.role == 'assistant' %}{{ '<reserved_107>' + turn.content }}"
    "{% else %}{{ '<reserved_106>' + turn.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)
_INTERNLM = NamedTemplate(
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ turn.content + '\\n' }}"
    "{% elif turn.role == 'assistant' %}{{ '<|Bot|>:' + turn.content + '<eoa>\\n' }}"
    "{% else %}{{ '<|User|>:' + turn.content + '<eoh>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}",
    ("<eoa>",),
)
_ZEPHYR = NamedTemplate(_marked("<|", "|>\n", "</s>\n"), ("</s>",))
_GEMMA = NamedTemplate(
    _with_system(
        "",
        "{{ bos_token or '' }}{% for turn in turns %}"
        "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' }}"
        "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ turn.content + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    ("<end_of_turn>",),
)
_DEEPSEEK = NamedTemplate(_colons("User", "Assistant", "\n\n", "<\uff5cend\u2581of\u2581sentence\uff5c>", ""))
_RAW = NamedTemplate("{% for turn in messages %}{{ turn.content }}{% endfor %}")

NAMED_TEMPLATES: Mapping[str, NamedTemplate] = {
    "vicuna_v1.1": _VICUNA,
    "zero_shot": _ZERO_SHOT,
    "one_shot": _ONE_SHOT,
    "raw": _RAW,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral": _MISTRAL,
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "qwen-7b-chat": _CHATML,
    "Yi-34b-chat": _CHATML,
    "mpt-7b-chat": _CHATML,
    "chatglm": _rounds(0, "\n"),
    "chatglm2": _rounds(1, "\n\n"),
    "chatglm3": _CHATGLM_3,
    "baichuan2-chat": _BAICHUAN_2,
    "internlm-chat": _INTERNLM,
    "zephyr": _ZEPHYR,
    "gemma": _GEMMA,
    "deepseek-chat": _DEEPSEEK,
}
