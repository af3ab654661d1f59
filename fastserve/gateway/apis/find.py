"""The APIs by the names that routes have for them."""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.gateway.apis import Api
from fastserve.gateway.apis.anthropic import ANTHROPIC
from fastserve.gateway.apis.ollama import OLLAMA
from fastserve.gateway.apis.openai import OPENAI
from fastserve.gateway.apis.responses import ResponsesApi
from fastserve.gateway.apis.slora import SLORA
from fastserve.gateway.apis.tokens import TOKENS

APIS: Mapping[str, Api] = {
    "openai": OPENAI,
    "slora": SLORA,
    "anthropic": ANTHROPIC,
    "ollama": OLLAMA,
    "tokens": TOKENS,
}


def api_of(name: str) -> Api:
    """The API of one request: some follow its stream."""
    return ResponsesApi() if name == "responses" else APIS[name]
