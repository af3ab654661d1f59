"""Routes whose requests name a model: workers answer them, and the API server relays them.

All else is derived from this list: the API server's routes, metrics and API docs, and the worker's routes and
capabilities. A new capability is one more line here, and its handler on the worker
(`fastserve/worker/openai_routes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel

from fastserve.openai.anthropic import CountTokensRequest, MessagesRequest
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import CompletionRequest
from fastserve.openai.ollama import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from fastserve.openai.slora import GenerateRequest

ContentsKind = Literal["objects", "texts", "list", "object", "text", "count"]
"""Kinds of an answer's main field: a non-empty list of objects, or of strings; a list of objects that may be empty; an
object; a string; a number."""


@dataclass(frozen=True)
class ModelRoute:
    path: str
    capability: str
    """Capability that a worker must announce to get these requests."""
    request: type[BaseModel]
    """Schema of the body."""
    answer: str
    """Value of the answer's `object` field; outside OpenAI's API the words for the answer."""
    summary: str
    contents: str = "choices"
    """Field that every answer has."""
    contents_kind: ContentsKind = "objects"
    method: str = "POST"
    remedy: str = ""
    """Advice in the error for a model without the capability."""
    api: Literal["openai", "slora", "anthropic", "ollama"] = "openai"
    """How requests name their model and streams end (`fastserve/gateway/apis/`)."""
    streams: bool | None = None
    """Whether all answers are streams; None: each request says so."""


CHAT = ModelRoute(
    "/v1/chat/completions",
    "chat",
    ChatRequest,
    "chat.completion",
    "Answer a chat",
    remedy="A worker offers it when its model has a chat template, or with --chat-template FILE.",
)
COMPLETIONS = ModelRoute("/v1/completions", "completions", CompletionRequest, "text_completion", "Continue a text")

MODEL_ROUTES = (CHAT, COMPLETIONS)
"""OpenAI's."""

GENERATE = ModelRoute(
    "/generate",
    "completions",
    GenerateRequest,
    "S-LoRA's answer",
    "Continue a text (S-LoRA's route)",
    contents="generated_text",
    api="slora",
    streams=False,
    contents_kind="texts",
)
GENERATE_STREAM = replace(
    GENERATE,
    path="/generate_stream",
    answer="S-LoRA's stream: an event for each token",
    summary="Continue a text in a stream (S-LoRA's route)",
    streams=True,
)
SLORA_ROUTES = (GENERATE, GENERATE_STREAM)

MESSAGES = ModelRoute(
    "/v1/messages",
    "chat",
    MessagesRequest,
    "Anthropic's message, or a stream of its events",
    "Answer a chat (Anthropic's route)",
    contents="content",
    contents_kind="list",
    remedy=CHAT.remedy,
    api="anthropic",
)
COUNT_TOKENS = replace(
    MESSAGES,
    path="/v1/messages/count_tokens",
    request=CountTokensRequest,
    answer="The number of tokens",
    summary="Count the tokens of a prompt (Anthropic's route)",
    contents="input_tokens",
    contents_kind="count",
    streams=False,
)
ANTHROPIC_ROUTES = (MESSAGES, COUNT_TOKENS)

OLLAMA_CHAT = ModelRoute(
    "/api/chat",
    "chat",
    OllamaChatRequest,
    "The message, or a stream of its pieces",
    "Answer a chat (Ollama's route)",
    contents="message",
    contents_kind="object",
    remedy=CHAT.remedy,
    api="ollama",
)
OLLAMA_GENERATE = replace(
    OLLAMA_CHAT,
    path="/api/generate",
    capability="completions",
    request=OllamaGenerateRequest,
    answer="The text, or a stream of its pieces",
    summary="Answer a prompt (Ollama's route)",
    contents="response",
    contents_kind="text",
    remedy="",
)
OLLAMA_SHOW = replace(
    OLLAMA_GENERATE,
    path="/api/show",
    request=OllamaShowRequest,
    answer="The model's template, sizes and capabilities",
    summary="Describe a model (Ollama's route)",
    contents="model_info",
    contents_kind="object",
    streams=False,
)
OLLAMA_ROUTES = (OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_SHOW)

RELAYED_ROUTES = (*MODEL_ROUTES, *SLORA_ROUTES, *ANTHROPIC_ROUTES, *OLLAMA_ROUTES)
"""All routes that the API server relays."""


def describe_capabilities(capabilities: Iterable[str], routes: Sequence[ModelRoute]) -> str:
    """List capabilities with their paths for an error message, such as `completions (/v1/completions)`."""
    paths = {route.capability: f"{route.capability} ({route.path})" for route in reversed(routes)}
    return ", ".join(paths.get(capability, capability) for capability in capabilities)
