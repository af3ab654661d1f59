"""A request becomes a job: template, tokens, length check, sampling parameters.

All of this may run in a thread of the prompt pool: it touches nothing but its arguments and the (thread-safe) metrics.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.engine.contract import SamplingParams
from fastserve.errors import InvalidRequestError, ModelNotFoundError, PermissionDeniedError
from fastserve.observability.text import printable
from fastserve.openai.body import RequestBounds
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from fastserve.openai.generation import GenerationRequest, check_request, parse_request
from fastserve.protocol import CHOICES_HEADER
from fastserve.text.chat_template import ChatTemplate, RenderedTooLongError
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.caller import Caller
from fastserve.worker.choice import OutputOptions
from fastserve.worker.encoding import PromptEncoder
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.sampling_params import SEED_MASK, SamplingDefaults, resolve

logger = logging.getLogger(__name__)

_MAX_UNKNOWN_NAMES = 100
"""Names of unknown fields that are remembered, and logged once each."""
_ONLY_AT_THE_END = 2**31


@dataclass(frozen=True)
class Prompt:
    text: str | None
    """None when the client sent token ids, or does not ask for the prompt's text."""
    token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class AnswerOptions:
    """Fields of a request that shape its answer. The rest of it is not kept while the answer is generated."""

    model: str
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    prompt_logprobs: int | None


@dataclass(frozen=True)
class Job:
    """One client request, checked and ready to run. Run i belongs to prompt i // num_runs."""

    caller: Caller
    prompts: list[Prompt]
    num_runs: int
    """Choices that are generated for each prompt."""
    num_choices: int
    """How many of them are returned: the best."""
    choices: tuple[int, ...]
    """Indices of the runs to generate, in ascending order: all, unless others are generated elsewhere."""
    output: OutputOptions
    priority: int
    answer: AnswerOptions

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts that are computed here, each once for all of its choices."""
        return sum(len(self.prompts[at].token_ids) for at in {index // self.num_runs for index in self.choices})


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
        bounds: RequestBounds,
        max_prompt_logprobs: int,
        template_timeout_s: float,
    ) -> None:
        """`max_sequences`: the most that one request may ask for, all its prompts and runs together.
        `max_prompt_logprobs`: likewise of log probabilities of prompt tokens.
        """
        self.model_names = list(model_names)
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.bounds = bounds
        self.encoder = PromptEncoder(tokenizer, vocab_size, context_length)
        self._template = template
        self._defaults = defaults
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences
        self._max_prompt_logprobs = max_prompt_logprobs
        self._template_timeout_s = template_timeout_s
        self._stream_interval = stream_interval
        self._seed = seed
        self._metrics = metrics
        self._unknown: set[str] = set()

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat(self, body: bytes, caller: Caller) -> Job:
        """The job of a chat request's body. Raises RequestError, as the other methods do."""
        request = parse_request(ChatRequest, body, self.bounds)
        self._check(request, caller)
        if self._template is None:
            raise InvalidRequestError(
                f"The model '{request.model}' has no chat template. Use /v1/completions, or start the worker with "
                "--chat-template FILE.",
                param="messages",
            )
        self._check_size(1, request)
        # Templates write the special tokens themselves.
        ids = self.encoder.encode(self._render(self._template, request), "messages", add_special_tokens=False)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        room = self.encoder.room(len(ids), "messages")
        self._check_prompt_logprobs(len(ids), request.prompt_logprobs)
        max_tokens = room if request.token_limit is None else min(request.token_limit, room)
        params = self._params(request, max_tokens, self._pick_seed(caller), logprobs, request.prompt_logprobs)
        return self._job(request, caller, [Prompt(None, ids, params)], logprobs, echo=False)

    def completion(self, body: bytes, caller: Caller) -> Job:
        """The job of a completion request's body."""
        return self._completion(parse_request(CompletionRequest, body, self.bounds), caller)

    def completion_of(self, fields: Mapping[str, Any], caller: Caller) -> Job:
        """The job of a completion request that has been read already."""
        return self._completion(check_request(CompletionRequest, fields, self.bounds), caller)

    def _completion(self, request: CompletionRequest, caller: Caller) -> Job:
        self._check(request, caller)
        seed = self._pick_seed(caller)
        given = request.prompts(self.bounds)
        self._check_size(len(given), request)
        asked = DEFAULT_MAX_TOKENS if request.token_limit is None else max(1, request.token_limit)
        prompts, num_tokens = [], 0
        for prompt in given:
            if isinstance(prompt, str):
                ids = self.encoder.encode(prompt, "prompt", add_special_tokens=True)
            else:
                ids = prompt
                self.encoder.check_given(ids, "prompt")
            num_tokens += len(ids)
            self._check_prompt_logprobs(num_tokens, request.asked_of_prompt)
            max_tokens = min(asked, self.encoder.room(len(ids), "prompt"))
            params = self._params(request, max_tokens, seed, request.logprobs, request.asked_of_prompt)
            prompts.append(Prompt(prompt if request.echo and isinstance(prompt, str) else None, ids, params))
        return self._job(request, caller, prompts, request.logprobs, echo=bool(request.echo))

    def _render(self, template: ChatTemplate, request: ChatRequest) -> str:
        try:
            return template.render(
                request.template_messages(self.bounds),
                max_chars=self.encoder.max_chars,
                timeout_s=self._template_timeout_s,
            )
        except RenderedTooLongError as error:
            raise self.encoder.refuse_chars(error.num_chars, "messages") from error

    def _check(self, request: GenerationRequest, caller: Caller) -> None:
        if request.model not in self.model_names:
            served = printable(", ".join(self.model_names), 300)
            raise ModelNotFoundError(
                f"The model '{printable(request.model, 80)}' is not served here. Served: {served}.", param="model"
            )
        if (request.priority or 0) < 0 and not caller.may_prioritise:
            raise PermissionDeniedError(
                f"Your key may not set a priority below 0 (given: {request.priority}). Leave it out, or ask whoever "
                "runs this server for a key with that right.",
                param="priority",
            )

    def _check_size(self, num_prompts: int, request: GenerationRequest) -> None:
        """Admission counts requests: one of them must not bring more sequences than the engine runs at once."""
        if num_prompts * request.num_runs > self._max_sequences:
            name = "n" if request.best_of is None else "best_of"
            asked = f"{num_prompts} prompts, {name}={request.num_runs}" if num_prompts > 1 else str(request.num_runs)
            param = "prompt" if num_prompts > self._max_sequences else name
            raise InvalidRequestError(
                f"Invalid value for '{param}': {asked}. This worker takes at most {self._max_sequences} sequences "
                f"(prompts times {name}) in one request; split the request.",
                param=param,
            )

    def _check_prompt_logprobs(self, num_tokens: int, num_top: int | None) -> None:
        if num_top is not None and num_tokens * (num_top + 1) > self._max_prompt_logprobs:
            raise InvalidRequestError(
                f"Log probabilities of {num_tokens} prompt tokens with {num_top} others each are more than this worker "
                f"gives in one request (--max-prompt-logprobs {self._max_prompt_logprobs}). Ask for fewer, or split "
                "the request.",
                param="logprobs",
            )

    def _pick_seed(self, caller: Caller) -> int:
        """The seed of a request that brings none: `--seed`, else the API server's, else a fresh one."""
        if self._seed is not None:
            return self._seed
        seed = caller.read_seed()
        return random.getrandbits(63) & SEED_MASK if seed is None else seed

    def _pick_choices(self, request: GenerationRequest, caller: Caller, num_prompts: int) -> tuple[int, ...]:
        num_choices = num_prompts * request.num_runs
        choices = caller.read_choices()
        if choices is None:
            return tuple(range(num_choices))
        if request.num_runs > request.num_choices:
            raise InvalidRequestError(
                f"The header '{CHOICES_HEADER}' cannot be given with best_of above n: the best are chosen of all.",
                param=CHOICES_HEADER,
            )
        if choices[-1] >= num_choices:
            raise InvalidRequestError(
                f"The header '{CHOICES_HEADER}' names choice {choices[-1]}, and the request asks for "
                f"{num_choices}, numbered from 0.",
                param=CHOICES_HEADER,
            )
        return choices

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

    def _job(
        self, request: GenerationRequest, caller: Caller, prompts: list[Prompt], logprobs: int | None, *, echo: bool
    ) -> Job:
        self._report_unknown(request.unknown)
        output = OutputOptions(
            stops=request.stop or (),
            include_stop=bool(request.include_stop_str_in_output),
            interval=self._stream_interval if request.stream else _ONLY_AT_THE_END,
            logprobs=logprobs is not None,
            # Who scores a prompt counts on one entry more than the prompt has when max_tokens is 1.
            stop_token_logprob=logprobs is not None and isinstance(request, CompletionRequest),
            prompt_only=request.token_limit == 0,
        )
        answer = AnswerOptions(
            model=request.model,
            stream=bool(request.stream),
            include_usage=request.wants_usage,
            logprobs=logprobs,
            echo=echo,
            prompt_logprobs=request.prompt_logprobs,
        )
        choices = self._pick_choices(request, caller, len(prompts))
        return Job(
            *(caller, prompts, request.num_runs, request.num_choices, choices),
            *(output, request.priority or 0, answer),
        )

    def _report_unknown(self, names: Sequence[str]) -> None:
        # Names come from clients, so they are bounded in number and length.
        for name in names:
            label = printable(name, 100)
            if label not in self._unknown and len(self._unknown) < _MAX_UNKNOWN_NAMES:
                self._unknown.add(label)
                logger.warning("request field '%s' is not known and has no effect (logged once)", label)
            self._metrics.unknown_fields.labels(label if label in self._unknown else "other").inc()
