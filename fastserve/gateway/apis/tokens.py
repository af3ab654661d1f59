"""Requests about tokens: `model` may be missing, or stand in the items of `prompts` (FastChat's token_check). There are
no streams."""

from __future__ import annotations

from fastserve.errors import InvalidRequestError
from fastserve.gateway.apis.only_base import only_base
from fastserve.gateway.apis.openai import OpenAIApi
from fastserve.gateway.dispatch import Dispatcher
from fastserve.gateway.peek import peek_tokens
from fastserve.openai.body import shown


class TokensApi(OpenAIApi):
    async def read_target(self, body: bytes, dispatcher: Dispatcher, *, streams: bool | None) -> tuple[str, bool]:
        models = peek_tokens(body)
        for at, model in enumerate(models):
            if model != models[0]:
                raise InvalidRequestError(
                    f"Invalid value for 'prompts.{at}.model': {shown(model)}. Ask for one model in a request.",
                    param=f"prompts.{at}.model",
                )
        if not models or models[0] is None:
            return only_base(dispatcher, "Give one of them as 'model'."), False
        return models[0], False


TOKENS = TokensApi()
