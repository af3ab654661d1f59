"""What is done with parameters that the schemas do not declare: three lists, and nothing is ignored in silence.

A parameter is either without effect on the answer (accepted), or known but not honoured yet (refused by name, unless
its value asks for nothing), or not known at all (accepted, and reported by the caller: OpenAI's clients send new ones
before servers know them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastserve.errors import UnsupportedParameterError

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)

_TEXT_FORMAT = {"type": "text"}
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # name: the values, besides null, that ask for nothing
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "images": ([],),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": (_TEXT_FORMAT,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_a": (0, 0.0),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raises UnsupportedParameterError for the first parameter that is known and asks for what we cannot do."""
    for name, value in given.items():
        if name in UNSUPPORTED and value is not None and not _asks_for_nothing(value, UNSUPPORTED[name]):
            shown = repr(value)
            raise UnsupportedParameterError(
                f"'{name}' is not supported yet (given: {shown if len(shown) <= 80 else shown[:77] + '...'}). "
                f"Leave it out.",
                param=name,
            )


def _asks_for_nothing(value: Any, neutral: Iterable[Any]) -> bool:
    # bool is an int in Python: True must not pass for 1.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


def unknown_parameters(given: Iterable[str]) -> list[str]:
    return [name for name in given if name not in WITHOUT_EFFECT and name not in UNSUPPORTED]
