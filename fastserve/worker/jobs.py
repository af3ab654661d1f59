"""From a request's body to a job: chat template, tokenization, length check, sampling params.

Thread-safe, since it runs in the threads of the prompt pool: nothing is shared but the metrics and the names of unknown
fields.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.engine.contract import SamplingParams
from fastserve.errors import InvalidRequestError, PermissionDeniedError
from fastserve.observability.text import printable
from fastserve.openai.body import RequestBounds
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from fastserve.openai.generation import GenerationRequest, check_request, parse_request
from fastserve.protocol import CHOICES_HEADER
from fastserve.text.chat_template import ChatTemplate, RenderedTooLongError
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.caller import Caller
from fastserve.worker.choice import OutputOptions
from fastserve.worker.encoding import PromptEncoder
from fastserve.worker.fingerprint import Fingerprints
from fastserve.worker.metrics import WorkerMetrics
from fastserve.worker.sampling_params import SEED_MASK, SamplingDefaults, resolve

logger = logging.getLogger(__name__)

_MAX_UNKNOWN_NAMES = 100
"""Maximum distinct unknown fields that are logged (once each) and have their own metric label."""
_NO_INTERVAL = 2**31
"""Interval of an answer that is not streamed: one delta, at the end."""


@dataclass(frozen=True)
class Prompt:
    text: str | None
    """None if the client sent token ids, or the answer does not contain the prompt."""
    token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class AnswerOptions:
    """Request fields that the writers need. The rest of the request is freed before generation."""

    model: str
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool
    prompt_logprobs: int | None
    fingerprint: str = ""
    """`system_fingerprint` of the answer."""


@dataclass(frozen=True)
class Job:
    """One client request, validated and ready to run. Run i belongs to prompt i // num_runs."""

    caller: Caller
    prompts: list[Prompt]
    num_runs: int
    """Choices generated for each prompt (best_of)."""
    num_choices: int
    """Choices returned for each prompt (n)."""
    choices: tuple[int, ...]
    """Indices of the runs to generate here, ascending: all, unless the caller asked for some of them."""
    output: OutputOptions
    priority: int
    answer: AnswerOptions
    adapter: str = ""
    """Name of the adapter; empty: the bare base model."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts that are computed here. A prompt counts once for all of its choices."""
        return sum(len(self.prompts[at].token_ids) for at in {index // self.num_runs for index in self.choices})


@dataclass(frozen=True)
class JobSettings:
    """Limits and defaults for requests, from the worker's options and the model."""

    model_names: tuple[str, ...]
    context_length: int
    """Maximum tokens of a prompt and its answer together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_sequences: int
    """Maximum sequences of one request: its prompts times its runs."""
    max_prompt_logprobs: int
    """Maximum log probabilities of prompt tokens in one answer."""
    bounds: RequestBounds
    sampling_defaults: SamplingDefaults
    template_timeout_s: float
    stream_interval: int
    """Tokens between two deltas of a streamed choice."""
    seed: int | None
    """Seed of requests without one; None: the API server's, else a random one."""


class JobMaker:
    def __init__(
        self,
        settings: JobSettings,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        metrics: WorkerMetrics,
        adapters: ServedAdapters,
        fingerprints: Fingerprints,
    ) -> None:
        """`template`: None if the model has no chat template."""
        self.settings = settings
        self._adapters = adapters
        self._fingerprints = fingerprints
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, settings.vocab_size, settings.context_length)
        self._template = template
        self._metrics = metrics
        self._unknown_fields: set[str] = set()

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template_source(self) -> str:
        """The chat template; "" if there is none."""
        return "" if self._template is None else self._template.source

    def chat(self, body: bytes, caller: Caller) -> Job:
        """Make a job from the body of a chat request. Raises RequestError, as all methods here do."""
        return self._chat(parse_request(ChatRequest, body, self.settings.bounds), caller)

    def chat_from_fields(self, fields: Mapping[str, Any], caller: Caller) -> Job:
        """Make a job from the fields of a chat request, for APIs whose requests say the same in other words."""
        return self._chat(check_request(ChatRequest, fields, self.settings.bounds), caller)

    def _chat(self, request: ChatRequest, caller: Caller) -> Job:
        self._check(request, caller)
        if self._template is None:
            raise InvalidRequestError(
                f"The model '{request.model}' has no chat template. Use /v1/completions, or start the worker with "
                "--chat-template FILE.",
                param="messages",
            )
        self._check_size(1, request)
        # Templates write the special tokens themselves.
        add_special_tokens = bool(request.add_special_tokens)
        text = self._render(self._template, request)
        ids = self.encoder.encode(text, "messages", add_special_tokens=add_special_tokens)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        max_tokens = self.encoder.max_output_tokens(len(ids), "messages")
        if request.token_limit is not None:
            max_tokens = min(request.token_limit, max_tokens)
        self._check_prompt_logprobs(len(ids), request.prompt_logprobs)
        params = self._params(request, max_tokens, self._pick_seed(caller), logprobs, request.prompt_logprobs)
        return self._job(request, caller, [Prompt(None, ids, params)], logprobs, echo=False, continues_prompt=False)

    def completion(self, body: bytes, caller: Caller) -> Job:
        """Make a job from the body of a completion request."""
        request = parse_request(CompletionRequest, body, self.settings.bounds)
        return self._completion(request, caller, continues_prompt=True)

    def completion_from_fields(self, fields: Mapping[str, Any], caller: Caller) -> Job:
        """Make a job from the fields of a completion request. Its answer is a text of its own, unless it begins with
        the prompt.
        """
        request = check_request(CompletionRequest, fields, self.settings.bounds)
        return self._completion(request, caller, continues_prompt=bool(request.echo))

    def _completion(self, request: CompletionRequest, caller: Caller, *, continues_prompt: bool) -> Job:
        self._check(request, caller)
        seed = self._pick_seed(caller)
        inputs = request.prompts(self.settings.bounds)
        self._check_size(len(inputs), request)
        token_limit = DEFAULT_MAX_TOKENS if request.token_limit is None else max(1, request.token_limit)
        prompts, num_tokens = [], 0
        for prompt in inputs:
            ids = self._token_ids(prompt, add_special_tokens=request.add_special_tokens is not False)
            num_tokens += len(ids)
            self._check_prompt_logprobs(num_tokens, request.num_prompt_logprobs)
            max_tokens = min(token_limit, self.encoder.max_output_tokens(len(ids), "prompt"))
            params = self._params(request, max_tokens, seed, request.logprobs, request.num_prompt_logprobs)
            prompts.append(Prompt(prompt if request.echo and isinstance(prompt, str) else None, ids, params))
        echo = bool(request.echo)
        return self._job(request, caller, prompts, request.logprobs, echo=echo, continues_prompt=continues_prompt)

    def _token_ids(self, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.encoder.encode(prompt, "prompt", add_special_tokens=add_special_tokens)
        self.encoder.check_token_ids(prompt, "prompt")
        return prompt

    def _render(self, template: ChatTemplate, request: ChatRequest) -> str:
        try:
            return template.render(
                request.template_messages(self.settings.bounds),
                max_chars=self.encoder.max_chars,
                timeout_s=self.settings.template_timeout_s,
            )
        except RenderedTooLongError as error:
            raise self.encoder.too_many_chars(error.num_chars, "messages") from error

    def _check(self, request: GenerationRequest, caller: Caller) -> None:
        self._adapter_of(request)
        if (request.priority or 0) < 0 and not caller.may_prioritise:
            raise PermissionDeniedError(
                f"Your key may not set a priority below 0 (given: {request.priority}). Leave it out, or ask whoever "
                "runs this server for a key with that right.",
                param="priority",
            )

    def _adapter_of(self, request: GenerationRequest) -> str:
        adapter = self._adapters.resolve(request.model)
        if adapter is None:
            raise self._adapters.unknown(request.model)
        return adapter

    def _check_size(self, num_prompts: int, request: GenerationRequest) -> None:
        """Admission counts requests, so one request must not have more sequences than the engine runs at once."""
        max_sequences = self.settings.max_sequences
        if num_prompts * request.num_runs > max_sequences:
            name = "n" if request.best_of is None else "best_of"
            value = f"{num_prompts} prompts, {name}={request.num_runs}" if num_prompts > 1 else str(request.num_runs)
            param = "prompt" if num_prompts > max_sequences else name
            raise InvalidRequestError(
                f"Invalid value for '{param}': {value}. This worker takes at most {max_sequences} sequences "
                f"(prompts times {name}) in one request; split the request.",
                param=param,
            )

    def _check_prompt_logprobs(self, num_tokens: int, num_top: int | None) -> None:
        limit = self.settings.max_prompt_logprobs
        if num_top is not None and num_tokens * (num_top + 1) > limit:
            raise InvalidRequestError(
                f"Log probabilities of {num_tokens} prompt tokens with {num_top} others each are more than this worker "
                f"gives in one request (--max-prompt-logprobs {limit}). Ask for fewer, or split "
                "the request.",
                param="logprobs",
            )

    def _pick_seed(self, caller: Caller) -> int:
        """Seed for a request without one: `--seed`, else the API server's, else random."""
        if self.settings.seed is not None:
            return self.settings.seed
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
            logprobs = 0  # best_of ranks by the mean logprob
        return resolve(
            request,
            self.settings.sampling_defaults,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            eos_token_ids=self.settings.eos_token_ids,
            vocab_size=self.settings.vocab_size,
        )

    def _job(
        self,
        request: GenerationRequest,
        caller: Caller,
        prompts: list[Prompt],
        logprobs: int | None,
        *,
        echo: bool,
        continues_prompt: bool,
    ) -> Job:
        self._report_unknown(request.unknown)
        adapter = self._adapter_of(request)
        output = OutputOptions(
            stops=request.stop or (),
            skip_special_tokens=request.skip_special_tokens is not False,
            continues_prompt=continues_prompt,
            include_stop=bool(request.include_stop_str_in_output),
            interval=self.settings.stream_interval if request.stream else _NO_INTERVAL,
            logprobs=logprobs is not None,
            # Clients that score a prompt with max_tokens=1 expect one entry more than the prompt has.
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
            fingerprint=self._fingerprints.of(adapter),
        )
        choices = self._pick_choices(request, caller, len(prompts))
        return Job(
            *(caller, prompts, request.num_runs, request.num_choices, choices),
            *(output, request.priority or 0, answer, adapter),
        )

    def _report_unknown(self, names: Sequence[str]) -> None:
        # Bounded in number and length: the names come from clients.
        for name in names:
            label = printable(name, 100)
            if label not in self._unknown_fields and len(self._unknown_fields) < _MAX_UNKNOWN_NAMES:
                self._unknown_fields.add(label)
                logger.warning("request field '%s' is not known and has no effect (logged once)", label)
            self._metrics.unknown_fields.labels(label if label in self._unknown_fields else "other").inc()
