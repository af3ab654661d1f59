"""A request becomes a job: template, tokens, length check, sampling parameters."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastserve.engine.contract import SamplingParams
from fastserve.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from fastserve.openai.sampling import GenerationRequest, invalid
from fastserve.text.chat_template import ChatTemplate
from fastserve.text.tokenizer import Tokenizer, encode_off_loop
from fastserve.worker.caller import Caller
from fastserve.worker.choice import Telling
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.sampling import SEED_MASK, SamplingDefaults, resolve

logger = logging.getLogger(__name__)

_MOST_UNKNOWN_NAMES = 100
"""Names of unknown fields that are remembered, and logged once each."""
_ONLY_AT_THE_END = 2**31


@dataclass(frozen=True)
class Prompt:
    text: str | None
    """None when the client sent token ids."""
    token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Job:
    """One client request, checked and ready to run. Run i belongs to prompt i // num_runs."""

    caller: Caller
    prompts: list[Prompt]
    num_runs: int
    """Choices that are generated for each prompt."""
    num_choices: int
    """How many of them are told: the best."""
    telling: Telling
    priority: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


class JobMaker:
    def __init__(
        self,
        *,
        model_names: Sequence[str],
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        defaults: SamplingDefaults,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        context_length: int,
        max_sequences: int,
        stream_interval: int,
        seed: int | None,
        metrics: WorkerMetrics,
    ) -> None:
        """`max_sequences`: the most that one request may ask for, all its prompts and runs together."""
        self.model_names = list(model_names)
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._template = template
        self._defaults = defaults
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences
        self._stream_interval = stream_interval
        self._seed = seed
        self._metrics = metrics
        self._unknown: set[str] = set()

    async def chat(self, request: ChatRequest, caller: Caller) -> Job:
        self._check_model(request.model)
        if self._template is None:
            raise InvalidRequestError(
                f"The model '{request.model}' has no chat template. Use /v1/completions, or start the worker with "
                "--chat-template FILE.",
                param="messages",
            )
        self._check_size(1, request)
        text = self._template.render(request.template_messages())
        # Templates write the special tokens themselves.
        ids = await encode_off_loop(self.tokenizer, text, add_special_tokens=False)
        self._check_encoded(ids, "messages")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        room = self._room(len(ids), "messages")
        max_tokens = room if request.token_limit is None else min(request.token_limit, room)
        params = self._params(request, max_tokens, self._pick_seed(), logprobs, request.prompt_logprobs)
        return self._job(request, caller, [Prompt(text, ids, params)], logprobs)

    async def completion(self, request: CompletionRequest, caller: Caller) -> Job:
        self._check_model(request.model)
        seed = self._pick_seed()
        given = request.prompts()
        self._check_size(len(given), request)
        prompts = []
        for text, ids in await self._encode(given):
            asked = DEFAULT_MAX_TOKENS if request.token_limit is None else max(1, request.token_limit)
            max_tokens = min(asked, self._room(len(ids), "prompt"))
            params = self._params(request, max_tokens, seed, request.logprobs, request.asked_of_prompt)
            prompts.append(Prompt(text, ids, params))
        return self._job(request, caller, prompts, request.logprobs)

    async def encode_rendered(self, text: str) -> list[int]:
        """The ids of a prompt that a FastChat client has written: BOS is put first unless the text has it."""
        bos = self.tokenizer.bos_text
        has_bos = bos is not None and text.startswith(bos)
        return await encode_off_loop(self.tokenizer, text, add_special_tokens=not has_bos)

    async def _encode(self, prompts: list[str | list[int]]) -> list[tuple[str | None, list[int]]]:
        """Text (None when the client sent ids) and ids of each prompt."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await self._encode_texts(texts))
        return [
            (prompt, self._check_encoded(next(encoded), "prompt"))
            if isinstance(prompt, str)
            else (None, self._check_given(prompt))
            for prompt in prompts
        ]

    async def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if len(texts) <= 1:
            return [await encode_off_loop(self.tokenizer, text, add_special_tokens=True) for text in texts]
        # Many short texts would hold up the event loop as one long text does: one thread takes them all.
        return await asyncio.to_thread(lambda: [self.tokenizer.encode(text, add_special_tokens=True) for text in texts])

    def _check_given(self, ids: list[int]) -> list[int]:
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise invalid("prompt", token_id, f"Token ids of this model run from 0 to {self._vocab_size - 1}.")
        return ids

    def _check_encoded(self, ids: list[int], param: str) -> list[int]:
        """A tokenizer may know added tokens that the model has no row for: these would be the engine's death."""
        if not ids:
            raise invalid(param, "", "It has no tokens; give at least one character.")
        if max(ids) >= self._vocab_size:
            token_id = next(token_id for token_id in ids if token_id >= self._vocab_size)
            token = self.tokenizer.token_bytes(token_id).decode(errors="replace")
            raise InvalidRequestError(
                f"Invalid value for '{param}': the tokenizer makes token id {token_id} of {token!r}, but ids of this "
                f"model run from 0 to {self._vocab_size - 1}. Leave this text out.",
                param=param,
            )
        return ids

    def _check_size(self, num_prompts: int, request: GenerationRequest) -> None:
        """Admission counts requests: one of them must not bring more sequences than the engine runs at once."""
        if num_prompts * request.num_runs > self._max_sequences:
            name = "n" if request.best_of is None else "best_of"
            raise invalid(
                "prompt" if num_prompts > self._max_sequences else name,
                f"{num_prompts} prompts, {name}={request.num_runs}" if num_prompts > 1 else request.num_runs,
                f"This worker takes at most {self._max_sequences} sequences (prompts times {name}) in one request; "
                "split the request.",
            )

    def _check_model(self, name: str) -> None:
        if name not in self.model_names:
            raise ModelNotFoundError(
                f"The model '{name}' is not served here. Served: {', '.join(self.model_names)}.", param="model"
            )

    def _room(self, num_tokens: int, param: str) -> int:
        """Tokens left for the answer. Raises ContextLengthError when there is none."""
        room = self.context_length - num_tokens
        if room < 1:
            raise ContextLengthError(
                f"This model's maximum context length is {self.context_length} tokens. However, your {param} resulted "
                f"in {num_tokens} tokens, and the answer needs at least one. Please reduce the length of the {param}.",
                param=param,
            )
        return room

    def _pick_seed(self) -> int:
        return random.getrandbits(63) & SEED_MASK if self._seed is None else self._seed

    def _params(
        self,
        request: GenerationRequest,
        max_tokens: int,
        seed: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        if logprobs is None and request.num_runs > request.num_choices:
            logprobs = 0  # by which the best are chosen
        return resolve(
            request,
            self._defaults,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._vocab_size,
        )

    def _job(self, request: GenerationRequest, caller: Caller, prompts: list[Prompt], logprobs: int | None) -> Job:
        self._report_unknown(request.unknown)
        telling = Telling(
            stops=request.stop or (),
            include_stop=bool(request.include_stop_str_in_output),
            interval=self._stream_interval if request.stream else _ONLY_AT_THE_END,
            logprobs=logprobs is not None,
            # Who scores a prompt counts on one entry more than the prompt has when max_tokens is 1.
            stop_token=logprobs is not None and isinstance(request, CompletionRequest),
            answer=request.token_limit != 0,
        )
        return Job(caller, prompts, request.num_runs, request.num_choices, telling, request.priority or 0)

    def _report_unknown(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._unknown and len(self._unknown) < _MOST_UNKNOWN_NAMES:
                self._unknown.add(name)
                logger.warning("request field %.100r is not known and has no effect (logged once)", name)
            # Names come from clients, so they are bounded in number and length.
            self._metrics.unknown_fields.labels(name[:100] if name in self._unknown else "other").inc()
