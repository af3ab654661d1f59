"""Fields of OpenAI's requests, and of other servers', that are accepted and do not change the answer's text.

They are declared so that a value of the wrong kind is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from fastserve.openai.body import Flag, Name, invalid, join

MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512


class AcceptedFields(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    user: Name | None = None
    """Accepted; no effect."""
    safety_identifier: Name | None = None
    """Accepted; no effect."""
    prompt_cache_key: Name | None = None
    """Accepted; no effect: equal beginnings of prompts share the KV cache without it."""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """Accepted; no effect."""
    store: Flag | None = None
    """Accepted; no effect: only answers of /v1/responses are stored."""
    metadata: dict[str, str] | None = None
    """Accepted; no effect. Up to 16 names of at most 64 characters, with texts of at most 512."""
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    """Returned in the answer; no other effect. `priority` is the field that changes the order of requests."""
    spaces_between_special_tokens: Flag | None = None
    """Accepted; no effect, as in transformers' fast tokenizers."""
    session_id: Name | None = None
    """Accepted; no effect."""
    cache_prompt: Flag | None = None
    """Accepted; no effect: prompts are always cached."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _read_metadata(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid("metadata", value, "Give an object with texts.")
        if len(value) > MAX_METADATA:
            raise invalid("metadata", value, f"Give at most {MAX_METADATA} names.")
        for name, text in value.items():
            if len(name) > MAX_METADATA_KEY_CHARS:
                raise invalid("metadata", name, f"A name has at most {MAX_METADATA_KEY_CHARS} characters.")
            if not isinstance(text, str) or len(text) > MAX_METADATA_VALUE_CHARS:
                remedy = f"Give a string of at most {MAX_METADATA_VALUE_CHARS} characters."
                raise invalid(join("metadata", name), text, remedy)
        return value
