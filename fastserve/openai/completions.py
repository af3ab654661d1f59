"""/v1/completions: the request as it arrives, the answer as it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import Field

from fastserve.openai.answers import TokenText, Usage, encode_json
from fastserve.openai.body import Flag, Integer, RequestBounds, invalid
from fastserve.openai.generation import MAX_TOP_LOGPROBS, GenerationRequest

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    prompt: Any
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    max_tokens: Integer | None = Field(None, ge=0)
    """0 asks for what is known of the prompt alone."""
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Flag | None = None
    """The text begins with the prompt, and the logprobs with those of the prompt's tokens."""

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("max_tokens", 0, "Give at least 1; 0 is allowed with echo=true or prompt_logprobs only.")

    @property
    def asked_of_prompt(self) -> int | None:
        """How many of the likeliest tokens to tell at each place of the prompt; None: the prompt has no logprobs."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)

    def prompts(self, bounds: RequestBounds) -> list[str | list[int]]:
        """Each prompt, as text or as token ids. Raises InvalidRequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if type(prompt[0]) is int:
                return [_ids(prompt)]
            if len(prompt) > bounds.max_prompts:
                raise invalid("prompt", prompt, f"Send at most {bounds.max_prompts} in one request (--max-prompts).")
            if isinstance(prompt[0], str):
                for item in prompt:
                    if not isinstance(item, str):
                        raise invalid("prompt", item, _PROMPT_REMEDY)
                return list(prompt)
            if isinstance(prompt[0], list):
                return [_ids(item) for item in prompt]
        raise invalid("prompt", prompt, _PROMPT_REMEDY)


_PROMPT_REMEDY = "Give a string, an array of strings, an array of token ids, or an array of these."


def _ids(prompt: Any) -> list[int]:
    """Token ids, as they are. Checked in C: prompts of a hundred thousand are nothing unusual."""
    if prompt:
        try:
            return msgspec.convert(prompt, list[int])
        except msgspec.ValidationError:
            wrong = next((item for item in prompt if type(item) is not int), None) if isinstance(prompt, list) else None
            raise invalid("prompt", prompt if wrong is None else wrong, _PROMPT_REMEDY) from None
    raise invalid("prompt", prompt, _PROMPT_REMEDY)


def completion_logprobs(tokens: Sequence[TokenText] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _top_logprobs(token: TokenText) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {data.decode(errors="replace"): logprob for data, logprob in [*token.top, (token.data, token.logprob)]}


def completion_choice(
    index: int,
    text: str,
    finish_reason: str | None,
    tokens: Sequence[TokenText] | None,
    prompt_logprobs: Any = None,
) -> dict[str, Any]:
    """`prompt_logprobs`: vLLM's field; left out when it is None."""
    extension = {} if prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs}
    return {
        "index": index,
        "text": text,
        "logprobs": completion_logprobs(tokens),
        "finish_reason": finish_reason,
        **extension,
    }


def completion_response(
    request_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: Usage
) -> dict[str, Any]:
    return {
        "id": f"cmpl-{request_id}",
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage.as_dict(),
        "system_fingerprint": None,
    }


class CompletionStream:
    """Writes the chunks of one streamed completion. The constant parts are serialised once."""

    def __init__(self, request_id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
        self._head = b"data: " + encode_json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def delta(
        self, index: int, text: str, tokens: Sequence[TokenText] | None, finish_reason: str | None = None
    ) -> bytes:
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            encode_json(text),
            encode_json(completion_logprobs(tokens)) if tokens else b"null",
            encode_json(finish_reason),
        )
        return self._head + choice + self._tail

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}\n\n"
