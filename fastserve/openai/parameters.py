"""What is done with fields that the schemas do not declare: lists for each place, and nothing is ignored in silence.

A field is either without effect on the answer (accepted), or known but not honoured yet (refused by name, unless
its value asks for nothing), or not known at all (accepted, and reported by the caller: OpenAI's clients send new ones
before servers know them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.errors import UnsupportedParameterError
from fastserve.openai.body import shown


@dataclass(frozen=True)
class KnownFields:
    """Fields that one place of a request may have beside those that its schema declares."""

    place: str
    """Where they stand, with a dot at the end; empty for the request itself."""
    without_effect: frozenset[str]
    unsupported: Mapping[str, tuple[Any, ...]]
    """The values, besides null, that ask for nothing."""

    def refuse_unsupported(self, given: Mapping[str, Any], where: str) -> None:
        """Raises UnsupportedParameterError for the first field that is known and asks for what we cannot do."""
        for name, value in given.items():
            if name in self.unsupported and value is not None and not _asks_for_nothing(value, self.unsupported[name]):
                raise UnsupportedParameterError(
                    f"'{where}{name}' is not supported yet (given: {shown(value)}). Leave it out.", param=where + name
                )

    def unknown(self, given: Iterable[str]) -> list[str]:
        return [self.place + name for name in given if name not in self.without_effect and name not in self.unsupported]


def _asks_for_nothing(value: Any, neutral: Iterable[Any]) -> bool:
    # bool is an int in Python: True must not pass for 1.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


_WITHOUT_EFFECT = frozenset(
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
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
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
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

REQUEST_FIELDS = KnownFields("", _WITHOUT_EFFECT, _UNSUPPORTED)
STREAM_OPTIONS_FIELDS = KnownFields(
    "stream_options.", frozenset(), {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
)
MESSAGE_FIELDS = KnownFields(
    "messages.",
    frozenset({"annotations"}),
    # Null or empty in the answers that clients send back as they got them.
    {"audio": (), "function_call": (), "prefix": (False,), "refusal": ("",)},
)
