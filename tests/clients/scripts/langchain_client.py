"""langchain-openai under langchain's standard suite for chat models. Run with pytest."""

from __future__ import annotations

import os

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestFastserve(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        kind: type[BaseChatModel] = ChatOpenAI
        return kind

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {
            "model": "fastserve-demo",
            "base_url": os.environ["FASTSERVE_URL"] + "/v1",
            "api_key": "none",
            "temperature": 0,
            "max_retries": 0,
            "max_tokens": 200,
            "stream_usage": True,
        }
