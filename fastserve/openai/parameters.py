"""Fields that the schemas do not declare. None is silently ignored.

Such a field is either without effect on the answer (accepted), or unsupported (refused by name, unless its value is
neutral), or unknown (accepted, and reported by the caller: OpenAI's clients send new fields before servers know them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastserve.errors import UnsupportedParameterError
from fastserve.openai.body import shown


@dataclass(frozen=True)
class KnownFields:
    """Fields that an object of a request may have besides those that its schema declares."""

    prefix: str
    """Path of the object, with a dot at the end; empty for the request itself."""
    without_effect: frozenset[str]
    unsupported: Mapping[str, tuple[Any, ...]]
    """Unsupported fields, with their neutral values besides null."""
    remedies: Mapping[str, str] = field(default_factory=dict)
    """Remedies other than leaving an unsupported field out."""

    def refuse_unsupported(self, fields: Mapping[str, Any], path: str) -> None:
        """Raises UnsupportedParameterError for the first unsupported field without a neutral value.

        `path`: like `prefix`, with indices.
        """
        for name, value in fields.items():
            if name in self.unsupported and value is not None and not _is_neutral(value, self.unsupported[name]):
                remedy = self.remedies.get(name, "Leave it out.")
                raise UnsupportedParameterError(
                    f"'{path}{name}' is not supported yet (given: {shown(value)}). {remedy}", param=path + name
                )

    def unknown(self, names: Iterable[str]) -> list[str]:
        return [
            self.prefix + name for name in names if name not in self.without_effect and name not in self.unsupported
        ]


def _is_neutral(value: Any, neutral: Iterable[Any]) -> bool:
    # bool is an int in Python: True must not pass for 1.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)


_WITHOUT_EFFECT = frozenset(
    {
        "prompt_cache_options",
        "id_slot",
        "sse_ping_interval",
    }
)

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "guided_decoding_backend": (),
    "images": ([],),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "repetition_detection": (),
    "return_progress": (False,),
    "return_prompt_text": (False,),
    "samplers": ([],),
    "timings_per_token": (False,),
    "top_a": (0, 0.0),
    "web_search_options": (),
}

# Without the field the base model would answer.
_ADAPTER_FIELDS = ("adapter_id", "adapter_name", "lora", "lora_dir", "lora_path", "lora_request")

REQUEST_FIELDS = KnownFields(
    "",
    _WITHOUT_EFFECT,
    {**_UNSUPPORTED, **dict.fromkeys(_ADAPTER_FIELDS, ("", []))},
    dict.fromkeys(_ADAPTER_FIELDS, "Name the adapter as 'model': NAME or BASE:NAME."),
)
STREAM_OPTIONS_FIELDS = KnownFields("stream_options.", frozenset(), {})
MESSAGE_FIELDS = KnownFields(
    "messages.",
    frozenset({"annotations", "prompt_cache_breakpoint"}),
    # Null or empty in answers, which clients send back unchanged.
    {"audio": (), "prefix": (False,), "refusal": ("",)},
)
