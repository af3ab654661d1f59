"""Ollama's API: schemas of its requests, and descriptions of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastserve.openai.body import Flag, Integer, at_most
from fastserve.openai.generation import MAX_TOP_LOGPROBS
from fastserve.openai.models import Model

API_VERSION = "0.12.0"
"""Version of Ollama whose API this is. Clients compare it with what they need."""
LATEST = ":latest"
"""The tag that a name without one has."""
NEVER = "2318-01-01T00:00:00Z"
"""When a model is unloaded."""
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class OllamaRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of a model or of an adapter; `NAME:latest` is `NAME`."""
    stream: Flag | None = None
    """The default is true."""
    options: dict[str, Any] | None = None
    """Sampling parameters (ollama.md lists them)."""
    format: str | dict[str, Any] | None = None
    """`json`, or a JSON schema."""
    think: Flag | str | None = None
    """Whether the model thinks before it answers, or how much: low, medium, high or max."""
    keep_alive: int | float | str | None = None
    """Accepted; no effect: a model stays loaded as long as its worker runs."""
    truncate: Flag | None = None
    """Accepted; no effect: prompts that are too long are refused."""
    shift: Flag | None = None
    """Accepted; no effect: an answer ends when the context is full."""
    logprobs: Flag | None = None
    """Whether the logprobs of the answer's tokens are returned."""
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """With logprobs: number of likeliest tokens at each place."""


class OllamaChatRequest(OllamaRequest):
    messages: Annotated[list[dict[str, Any]] | None, at_most("max_messages", "messages")] = None
    """The chat. None: the answer says that the model is loaded."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the model may call."""


class OllamaGenerateRequest(OllamaRequest):
    prompt: str | None = None
    """The text. Empty: the answer says that the model is loaded."""
    system: str | None = None
    """The system message."""
    raw: Flag | None = None
    """Whether the prompt goes to the model as it is, without the chat template."""
    suffix: str | None = None
    """Refused unless empty."""
    template: str | None = None
    """Refused unless empty."""
    images: Any = None
    """Refused unless empty."""
    context: Any = None
    """Refused unless empty."""


class OllamaEmbedRequest(BaseModel):
    """Body of /api/embed."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of a model; `NAME:latest` is `NAME`."""
    input: Any
    """A text, or a list of texts."""
    truncate: Flag | None = None
    """Whether texts that are too long are cut; else they are refused. The default is true."""
    dimensions: Integer | None = None
    """Numbers of each vector that are kept."""
    options: dict[str, Any] | None = None
    """Accepted; no effect."""
    keep_alive: int | float | str | None = None
    """Accepted; no effect."""


class OllamaEmbeddingsRequest(BaseModel):
    """Body of /api/embeddings, the older route for one text."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of a model; `NAME:latest` is `NAME`."""
    prompt: str
    """The text."""
    options: dict[str, Any] | None = None
    """Accepted; no effect."""
    keep_alive: int | float | str | None = None
    """Accepted; no effect."""


class OllamaShowRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    """Name of a model or of an adapter."""
    name: str | None = None
    """The older name of `model`."""
    verbose: Flag | None = None
    """Accepted; no effect."""


def untagged(name: str) -> str:
    """A model's name without the tag `latest`."""
    return name.removesuffix(LATEST)


def listed(models: Sequence[Model]) -> dict[str, Any]:
    """The answer of `/api/tags`."""
    return {"models": [_entry(model) | {"modified_at": timestamp(model.created)} for model in models]}


def running(models: Sequence[Model]) -> dict[str, Any]:
    """The answer of `/api/ps`: served models are loaded."""
    return {"models": [_entry(model) | {"expires_at": NEVER, "size_vram": 0} for model in models]}


def _entry(model: Model) -> dict[str, Any]:
    digest = hashlib.sha256(model.id.encode()).hexdigest()
    details = describe_details("", "", "") | {"parent_model": model.parent or ""}
    return {"name": model.id, "model": model.id, "size": 0, "digest": digest, "details": details}


def describe_details(family: str, parameter_size: str, dtype: str) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": parameter_size,
        "quantization_level": _DTYPES.get(dtype, dtype.upper()),
    }


def describe(
    *, template: str, details: Mapping[str, Any], num_parameters: int, context_length: int, modified_at: int
) -> dict[str, Any]:
    """The answer of `/api/show`."""
    family = details["family"]
    capabilities = ["completion"]
    if "tools" in template:
        capabilities.append("tools")
    if "enable_thinking" in template or "<think>" in template:
        capabilities.append("thinking")
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "license": "",
        "details": dict(details),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": num_parameters,
            f"{family}.context_length": context_length,
        },
        "capabilities": capabilities,
        "modified_at": timestamp(modified_at),
    }


def timestamp(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat().replace("+00:00", "Z")
