"""The answer of /v1/completions: text, after the prompt if the request has `echo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastserve.errors import FastserveError
from fastserve.openai.answers import (
    KEEP_ALIVE,
    NO_FIELDS,
    ChunkStream,
    DecodedToken,
    Usage,
    encode_json,
    token_id_name,
    token_text,
)
from fastserve.text.parts import plain_text
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.choice import ChoiceDelta
from fastserve.worker.jobs import Job
from fastserve.worker.prompts import Echo, logprobs_by_id
from fastserve.worker.results import ChoiceResult, JobResult, RunningUsage, extra_fields


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
        self._usage = RunningUsage(job) if options.sends_continuous_usage else None
        self._chunks = ChunkStream(
            self._head(), "text", include_usage=options.include_usage, obfuscates=options.sends_obfuscation
        )

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._job.caller.request_id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._job.answer.model,
            "system_fingerprint": self._job.answer.fingerprint,
            **self._job.answer.extra,
        }

    def write(self, deltas: Sequence[ChoiceDelta]) -> bytes:
        return b"".join(map(self._write_delta, deltas))

    def _write_delta(self, delta: ChoiceDelta) -> bytes:
        index, text, tokens = delta.choice, plain_text(delta.parts), delta.tokens
        options, is_first = self._job.answer, index not in self._begun
        self._begun.add(index)
        echo = self._echoes[index // self._job.num_choices]
        if echo is not None:
            if is_first:
                text, tokens = echo.prepend(text, tokens, delta.prompt_logprobs)
            elif tokens:
                tokens = echo.shift(tokens)
        fields = extra_fields(delta, has_token_ids=options.returns_token_ids)
        if is_first and options.returns_token_ids:
            fields["prompt_token_ids"] = self._prompt_ids(index)
        return self._chunks.chunk(
            index,
            encode_json(text),
            encode_json(completion_logprobs(tokens, by_id=options.names_tokens_by_id)) if tokens else b"null",
            encode_json(delta.finish_reason),
            fields,
            NO_FIELDS if self._usage is None else {"usage": self._usage.count(delta).as_dict()},
        )

    def _prompt_ids(self, index: int) -> list[int]:
        return self._job.prompts[index // self._job.num_choices].token_ids

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
        text, tokens, options = plain_text(choice.parts), choice.tokens, self._job.answer
        echo = self._echoes[choice.index // self._job.num_choices]
        if echo is not None:
            text, tokens = echo.prepend(text, tokens, choice.prompt_logprobs)
        fields = {
            "index": choice.index,
            "text": text,
            "logprobs": None if tokens is None else completion_logprobs(tokens, by_id=options.names_tokens_by_id),
            "finish_reason": choice.finish_reason,
            **extra_fields(choice, has_token_ids=options.returns_token_ids),
        }
        if options.returns_token_ids:
            fields["prompt_token_ids"] = self._prompt_ids(choice.index)
        num_top = options.prompt_logprobs
        if num_top is not None:  # vLLM's field
            fields["prompt_logprobs"] = logprobs_by_id(self._tokenizer, choice.prompt_logprobs or [], num_top)
        return fields


def completion_logprobs(tokens: Sequence[DecodedToken], *, by_id: bool = False) -> dict[str, Any]:
    """`by_id`: whether tokens are named by their ids instead of their texts."""
    return {
        "tokens": [token_id_name(token.token_id) if by_id else token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_logprobs(token, by_id=by_id) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def _top_logprobs(token: DecodedToken, *, by_id: bool) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {
        token_id_name(token_id) if by_id else token_text(data): logprob
        for token_id, data, logprob in [*token.top, (token.token_id, token.data, token.logprob)]
    }
