"""Routes whose requests name a model: workers answer them, and the API server relays them.

All else is derived from this list: the API server's routes, metrics and API docs, and the worker's routes and
capabilities. A new capability is one more line here, and its handler on the worker
(`fastserve/worker/openai_routes.py`).
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
    """Capability that a worker must announce to get these requests."""
    request: type[BaseModel]
    """Schema of the body."""
    answer: str
    """Value of the answer's `object` field."""
    summary: str
    contents: str = "choices"
    """Field of the answer that is a non-empty list of objects."""
    method: str = "POST"
    remedy: str = ""
    """Advice in the error for a model without the capability."""


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
    """List capabilities with their paths for an error message, such as `completions (/v1/completions)`."""
    paths = {route.capability: f"{route.capability} ({route.path})" for route in routes}
    return ", ".join(paths.get(capability, capability) for capability in capabilities)
