"""Schema of a /v1/completions request."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import ConfigDict, Field

from fastserve.errors import UnsupportedParameterError
from fastserve.openai.body import Flag, Integer, RequestBounds, invalid, shown
from fastserve.openai.generation import MAX_TOP_LOGPROBS, GenerationRequest

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt: Any
    """A string, an array of strings, an array of token ids, or an array of arrays of token ids."""
    max_tokens: Integer | None = Field(None, ge=0)
    """Maximum tokens of an answer, lowered to what the context leaves. 0: return only the prompt (`echo`) or its log
    probabilities. Default: 16."""
    logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Number of likeliest tokens whose logprobs are returned at each place, besides that of the token sampled."""
    echo: Flag | None = None
    """Whether the text begins with the prompt, and the logprobs with those of the prompt's tokens."""
    suffix: str | None = None
    """Text after the completion. Refused unless empty: models with tokens for filling in the middle are not known to
    this server."""

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise UnsupportedParameterError(
                f"'suffix' is not supported by this model (given: {shown(self.suffix)}). Write both texts into the "
                "prompt, with the model's own tokens for filling in the middle, and leave it out.",
                param="suffix",
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("max_tokens", 0, "Give at least 1; 0 is allowed with echo=true or prompt_logprobs only.")

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Number of top logprobs at each position of the prompt; None: no logprobs of the prompt."""
        requested = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in requested if count is not None), default=None)

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
    """Validate token ids, in C: prompts of a hundred thousand tokens are common."""
    if prompt:
        try:
            return msgspec.convert(prompt, list[int])
        except msgspec.ValidationError:
            wrong = next((item for item in prompt if type(item) is not int), None) if isinstance(prompt, list) else None
            raise invalid("prompt", prompt if wrong is None else wrong, _PROMPT_REMEDY) from None
    raise invalid("prompt", prompt, _PROMPT_REMEDY)
