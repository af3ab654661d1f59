"""The answer of /v1/completions: text, after the prompt if the request has `echo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import KEEP_ALIVE, ChunkStream, DecodedToken, Usage, encode_json
from fastserve.text.parts import plain_text
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import Echo, logprobs_by_id
from fastserve.worker.results import ChoiceResult, JobResult, weight_versions_of


class CompletionWriter:
    keep_alive = KEEP_ALIVE

    def __init__(self, job: Job, created: int, tokenizer: Tokenizer) -> None:
        """Takes time in proportion to the echoed prompts."""
        options = job.answer
        self._job = job
        self._created = created
        self._tokenizer = tokenizer
        self._echoes = (
            [Echo(tokenizer, prompt, options.logprobs or 0) for prompt in job.prompts]
            if options.echo
            else [None] * len(job.prompts)
        )
        self._begun: set[int] = set()
        self._chunks = ChunkStream(self._head(), "text", include_usage=options.include_usage)

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._job.caller.request_id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._job.answer.model,
            "system_fingerprint": self._job.answer.fingerprint,
        }

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(map(self._write_delta, deltas))

    def _write_delta(self, delta: ChoiceDelta) -> bytes:
        index, text, tokens = delta.choice, plain_text(delta.parts), delta.tokens
        echo = self._echoes[index // self._job.num_choices]
        if echo is not None:
            if index not in self._begun:
                self._begun.add(index)
                text, tokens = echo.prepend(text, tokens, delta.prompt_logprobs)
            elif tokens:
                tokens = echo.shift(tokens)
        return self._chunks.chunk(
            index,
            encode_json(text),
            encode_json(completion_logprobs(tokens)) if tokens else b"null",
            encode_json(delta.finish_reason),
            delta.weight_versions,
        )

    def end(self, usage: Usage) -> bytes:
        return self._chunks.end(usage)

    def error(self, error: FastserveError) -> bytes:
        return error.events()

    def whole(self, result: JobResult) -> bytes:
        body = self._head() | {
            "choices": [self._choice(choice) for choice in result.choices],
            "usage": result.usage.as_dict(),
        }
        return encode_json(body)

    def _choice(self, choice: ChoiceResult) -> dict[str, Any]:
        text, tokens = plain_text(choice.parts), choice.tokens
        echo = self._echoes[choice.index // self._job.num_choices]
        if echo is not None:
            text, tokens = echo.prepend(text, tokens, choice.prompt_logprobs)
        fields = {
            "index": choice.index,
            "text": text,
            "logprobs": None if tokens is None else completion_logprobs(tokens),
            "finish_reason": choice.finish_reason,
        }
        num_top = self._job.answer.prompt_logprobs
        if num_top is not None:  # vLLM's field
            fields["prompt_logprobs"] = logprobs_by_id(self._tokenizer, choice.prompt_logprobs or [], num_top)
        return fields | weight_versions_of(choice)


def completion_logprobs(tokens: Sequence[DecodedToken]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _top_logprobs(token: DecodedToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {data.decode(errors="replace"): logprob for data, logprob in [*token.top, (token.data, token.logprob)]}
