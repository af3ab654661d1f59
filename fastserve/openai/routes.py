"""The routes whose requests name a model: a worker answers them, and the API server passes them on.

This list is the only one. The API server's routes, its metrics and its description of the API, and the worker's routes
and the capabilities that it announces are all made from it. A new capability is one more line here, and its handler on
the worker (`fastserve/worker/openai_routes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import CompletionRequest


@dataclass(frozen=True)
class ModelRoute:
    path: str
    capability: str
    """What a worker must offer to get these requests."""
    request: type[BaseModel]
    """Schema of the body."""
    answer: str
    """Name of the `object` that the answer is."""
    summary: str
    contents: str = "choices"
    """Field of the answer that is a list of objects, and never empty."""
    method: str = "POST"
    remedy: str = ""
    """A sentence for those whose model lacks the capability."""


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


def describe_capabilities(capabilities: Iterable[str], routes: Sequence[ModelRoute]) -> str:
    """The capabilities with their paths, for an error message: `completions (/v1/completions)`."""
    paths = {route.capability: f"{route.capability} ({route.path})" for route in routes}
    return ", ".join(paths.get(capability, capability) for capability in capabilities)
