"""A request becomes a job: template, tokens, length check, sampling parameters."""

from __future__ import annotations

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
    """One client request, checked and ready to run. Choice i belongs to prompt i // num_choices."""

    caller: Caller
    prompts: list[Prompt]
    num_choices: int
    stops: tuple[str, ...]
    include_stop: bool
    interval: int
    """Tokens between two deltas."""

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
        stream_interval: int,
        seed: int | None,
        metrics: WorkerMetrics,
    ) -> None:
        self.model_names = list(model_names)
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._template = template
        self._defaults = defaults
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
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
        text = self._template.render(request.template_messages())
        # Templates write the special tokens themselves.
        ids = await encode_off_loop(self.tokenizer, text, add_special_tokens=False)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        room = self._room(len(ids), "messages")
        max_tokens = room if request.token_limit is None else min(request.token_limit, room)
        prompt = Prompt(text, ids, self._params(request, max_tokens, self._pick_seed(), logprobs))
        return self._job(request, caller, [prompt])

    async def completion(self, request: CompletionRequest, caller: Caller) -> Job:
        self._check_model(request.model)
        seed = self._pick_seed()
        prompts = []
        for given in request.prompts():
            text, ids = await self._encode(given)
            max_tokens = min(request.token_limit or DEFAULT_MAX_TOKENS, self._room(len(ids), "prompt"))
            prompts.append(Prompt(text, ids, self._params(request, max_tokens, seed, request.logprobs)))
        return self._job(request, caller, prompts)

    async def encode_rendered(self, text: str) -> list[int]:
        """The ids of a prompt that a FastChat client has written: BOS is put first unless the text has it."""
        bos = self.tokenizer.bos_text
        has_bos = bos is not None and text.startswith(bos)
        return await encode_off_loop(self.tokenizer, text, add_special_tokens=not has_bos)

    async def _encode(self, prompt: str | list[int]) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            ids = await encode_off_loop(self.tokenizer, prompt, add_special_tokens=True)
            if not ids:
                raise invalid("prompt", prompt, "It has no tokens; give at least one character.")
            return prompt, ids
        for token_id in prompt:
            if not 0 <= token_id < self._vocab_size:
                raise invalid("prompt", token_id, f"Token ids of this model run from 0 to {self._vocab_size - 1}.")
        return None, prompt

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

    def _params(self, request: GenerationRequest, max_tokens: int, seed: int, logprobs: int | None) -> SamplingParams:
        return resolve(
            request,
            self._defaults,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=logprobs,
            eos_token_ids=self._eos_token_ids,
            vocab_size=self._vocab_size,
        )

    def _job(self, request: GenerationRequest, caller: Caller, prompts: list[Prompt]) -> Job:
        self._report_unknown(request.unknown)
        return Job(
            caller=caller,
            prompts=prompts,
            num_choices=request.num_choices,
            stops=request.stop or (),
            include_stop=bool(request.include_stop_str_in_output),
            interval=self._stream_interval if request.stream else _ONLY_AT_THE_END,
        )

    def _report_unknown(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._unknown and len(self._unknown) < _MOST_UNKNOWN_NAMES:
                self._unknown.add(name)
                logger.warning("request field %.100r is not known and has no effect (logged once)", name)
            # Names come from clients, so they are bounded in number and length.
            self._metrics.unknown_fields.labels(name[:100] if name in self._unknown else "other").inc()
