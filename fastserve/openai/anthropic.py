"""Anthropic's API: schemas of the requests of its Messages, and its list of models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastserve.openai.body import Flag, Integer, Number, at_most
from fastserve.openai.generation import MAX_COUNT
from fastserve.openai.models import Model

WITHOUT_EFFECT = frozenset(
    {
        "anthropic_beta",
        "anthropic_version",
        "betas",
        "cache_control",
        "container",
        "context_management",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
    }
)
"""Fields that are accepted and have no effect."""


def anthropic_card(model: Model) -> dict[str, Any]:
    """A model as Anthropic's `/v1/models` describes it."""
    created = datetime.fromtimestamp(model.created, UTC)
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.id,
        "created_at": created.isoformat().replace("+00:00", "Z"),
    }


def anthropic_cards(models: Sequence[Model]) -> dict[str, Any]:
    """The answer of `/v1/models` for Anthropic's clients: all models, on one page."""
    first, last = (models[0].id, models[-1].id) if models else (None, None)
    return {"data": [anthropic_card(model) for model in models], "has_more": False, "first_id": first, "last_id": last}


class CountTokensRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    """Name of a model or of an adapter."""
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True), at_most("max_messages", "messages")]
    """Each with a role and content, a string or an array of blocks."""
    system: str | list[Any] | None = None
    """A string, or text blocks."""
    tools: list[dict[str, Any]] | None = None
    """Tools with `name`, `description` and `input_schema`. Anthropic's own are refused by name."""
    tool_choice: dict[str, Any] | None = None
    """`{"type": ...}` with auto, any, tool (and its `name`) or none."""
    thinking: dict[str, Any] | None = None
    """`{"type": ...}` with enabled (and `budget_tokens`), disabled or adaptive."""
    output_config: dict[str, Any] | None = None
    """`effort`, and `format` with a JSON schema."""
    output_format: dict[str, Any] | None = None
    """The older name of output_config.format."""
    mcp_servers: list[Any] | None = None
    """Refused unless empty."""
    thread: dict[str, Any] | None = None
    """Refused: it has messages kept by the server between requests."""


class MessagesRequest(CountTokensRequest):
    max_tokens: Integer = Field(ge=1, le=MAX_COUNT)
    """Maximum tokens of the answer, thinking included."""
    stream: Flag | None = None
    """Whether the answer comes as named server-sent events."""
    temperature: Number | None = Field(None, ge=0, le=2)
    """0 is greedy. Default: the model's own, else 1."""
    top_p: Number | None = Field(None, ge=0, le=1)
    """0 is greedy. Default: the model's own, else 1."""
    top_k: Integer | None = Field(None, ge=0, le=MAX_COUNT)
    """0 is off."""
    stop_sequences: list[str] | None = None
    """Texts that end the answer."""
