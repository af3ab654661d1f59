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

from fastserve.errors import UnsupportedCapabilityError
from fastserve.observability.text import printable
from fastserve.openai.anthropic import CountTokensRequest, MessagesRequest
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import CompletionRequest
from fastserve.openai.embeddings import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolRequest,
    RerankRequest,
    ScoreRequest,
)
from fastserve.openai.ollama import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from fastserve.openai.responses.request import ResponsesRequest
from fastserve.openai.slora import GenerateRequest
from fastserve.openai.tokens import DetokenizeRequest, TokenCheckRequest, TokenizeRequest

ContentsKind = Literal["objects", "texts", "list", "object", "text", "count", "vector", "vectors"]
"""Kinds of an answer's main field: a non-empty list of objects, or of strings; a list of objects that may be empty; an
object; a string; a number; a list of numbers; a list of such lists."""

MODEL_IN_PATH = "{model:path}"


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
    api: Literal["openai", "responses", "slora", "anthropic", "ollama", "tokens"] = "openai"
    """How requests name their model and streams end (`fastserve/gateway/apis/`)."""
    streams: bool | None = None
    """Whether all answers are streams; None: each request says so."""

    @property
    def names_model(self) -> bool:
        """Whether the path has the model, and not the body."""
        return MODEL_IN_PATH in self.path


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

RESPONSES = ModelRoute(
    "/v1/responses",
    "chat",
    ResponsesRequest,
    "response",
    "Answer with items (OpenAI's Responses API)",
    contents="output",
    remedy=CHAT.remedy,
    api="responses",
)
RESPONSE_TOKENS = replace(
    RESPONSES,
    path="/v1/responses/input_tokens",
    answer="response.input_tokens",
    summary="Count the input tokens of a response",
    contents="input_tokens",
    contents_kind="count",
    streams=False,
)
RESPONSES_ROUTES = (RESPONSES, RESPONSE_TOKENS)

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
    answer="an object with `input_tokens`, the number of tokens",
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
    "the message, or a stream of its pieces as lines of JSON",
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
    answer="the text, or a stream of its pieces as lines of JSON",
    summary="Answer a prompt (Ollama's route)",
    contents="response",
    contents_kind="text",
    remedy="",
)
OLLAMA_SHOW = replace(
    OLLAMA_GENERATE,
    path="/api/show",
    request=OllamaShowRequest,
    answer="the model's template, sizes and capabilities",
    summary="Describe a model (Ollama's route)",
    contents="model_info",
    contents_kind="object",
    streams=False,
)
OLLAMA_ROUTES = (OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_SHOW)


TOKENIZE = ModelRoute(
    "/tokenize",
    "completions",
    TokenizeRequest,
    "the tokens of a text or a chat: `count`, `max_model_len`, `tokens`",
    "Split a text or a chat into tokens",
    contents="count",
    contents_kind="count",
    api="tokens",
    streams=False,
)
DETOKENIZE = replace(
    TOKENIZE,
    path="/detokenize",
    request=DetokenizeRequest,
    answer="the text of tokens: `prompt`, and the same as `content`",
    summary="Join tokens to a text",
    contents="prompt",
    contents_kind="text",
)
TOKEN_ROUTES = (TOKENIZE, DETOKENIZE)

TOKEN_CHECK = replace(
    TOKENIZE,
    path="/api/v1/token_check",
    request=TokenCheckRequest,
    answer="FastChat's answer: `fits`, `tokenCount` and `contextLength` of each of the `prompts`",
    summary="Say whether prompts fit into the context (FastChat's route)",
    contents="prompts",
    contents_kind="objects",
)
FASTCHAT_CHAT = replace(CHAT, path="/api/v1/chat/completions", summary="Answer a chat (FastChat's route)")
FASTCHAT_ROUTES = (TOKEN_CHECK, FASTCHAT_CHAT)

_REMEDY_OF_KIND = "A worker whose model embeds or classifies offers it (docs/embeddings.md)."
EMBEDDINGS = ModelRoute(
    "/v1/embeddings",
    "embeddings",
    EmbeddingRequest,
    "list",
    "Turn texts into vectors",
    contents="data",
    remedy=_REMEDY_OF_KIND,
    streams=False,
)
ENGINE_EMBEDDINGS = replace(
    EMBEDDINGS,
    path=f"/v1/engines/{MODEL_IN_PATH}/embeddings",
    summary="Turn texts into vectors (the model is in the path)",
)
RERANK = replace(
    EMBEDDINGS,
    path="/v1/rerank",
    capability="rerank",
    request=RerankRequest,
    summary="Sort documents by their relevance for a query (Jina's form)",
    contents="results",
)
COHERE_RERANK = replace(
    RERANK, path="/v2/rerank", summary="Sort documents by their relevance for a query (Cohere's form)"
)
SCORE = replace(EMBEDDINGS, path="/v1/score", capability="score", request=ScoreRequest, summary="Score pairs of texts")
CLASSIFY = replace(
    EMBEDDINGS,
    path="/v1/classify",
    capability="classify",
    request=ClassifyRequest,
    summary="Give the probabilities of a classifier's labels for texts",
)
POOLING = replace(
    EMBEDDINGS,
    path="/v1/pooling",
    capability="pooling",
    request=PoolRequest,
    summary="Give the vectors of texts or tokens, or the scores, that a pooling model computes",
)
OLLAMA_EMBED = replace(
    EMBEDDINGS,
    path="/api/embed",
    request=OllamaEmbedRequest,
    answer="`embeddings`, a vector for each text",
    summary="Turn texts into vectors (Ollama's route)",
    contents="embeddings",
    contents_kind="vectors",
    api="ollama",
)
OLLAMA_EMBEDDINGS = replace(
    OLLAMA_EMBED,
    path="/api/embeddings",
    request=OllamaEmbeddingsRequest,
    answer="`embedding`, the vector of the text",
    summary="Turn a text into a vector (Ollama's older route)",
    contents="embedding",
    contents_kind="vector",
)
POOLING_ROUTES: tuple[ModelRoute, ...] = (
    *(EMBEDDINGS, ENGINE_EMBEDDINGS),
    *(
        alias
        for route in (RERANK, SCORE, CLASSIFY, POOLING)
        for alias in (route, replace(route, path=route.path.removeprefix("/v1"), summary=f"{route.summary}: an alias"))
    ),
    COHERE_RERANK,
)

RELAYED_ROUTES = (
    *(*MODEL_ROUTES, *RESPONSES_ROUTES, *POOLING_ROUTES, *TOKEN_ROUTES),
    *(*FASTCHAT_ROUTES, *SLORA_ROUTES, *ANTHROPIC_ROUTES, *OLLAMA_ROUTES),
    *(OLLAMA_EMBED, OLLAMA_EMBEDDINGS),
)
"""All that the API server relays."""


def unsupported(
    model: str, route: ModelRoute, offered: Iterable[str], routes: Sequence[ModelRoute]
) -> UnsupportedCapabilityError:
    """The error for a route that no worker of the model offers, with the capabilities that are `offered`."""
    return UnsupportedCapabilityError(
        f"The model '{printable(model, 100)}' does not support {route.capability} ({route.path}). It supports: "
        f"{describe_capabilities(offered, routes)}. {route.remedy}".rstrip(),
        param="model",
    )


def describe_capabilities(capabilities: Iterable[str], routes: Sequence[ModelRoute]) -> str:
    """List capabilities with their paths for an error message, such as `completions (/v1/completions)`."""
    paths = {route.capability: f"{route.capability} ({route.path})" for route in reversed(routes)}
    return ", ".join(paths.get(capability, capability) for capability in capabilities)
