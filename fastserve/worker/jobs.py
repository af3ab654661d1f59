"""From a request's body to a job: chat template, tokenization, length check, sampling params.

Thread-safe, since it runs in the threads of the prompt pool: nothing is shared but the metrics and the names of unknown
fields.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from fastserve.engine.contract import SamplingParams
from fastserve.errors import InvalidRequestError, PermissionDeniedError, StartupError, UnsupportedParameterError
from fastserve.observability.text import printable
from fastserve.openai.body import RequestBounds, invalid
from fastserve.openai.chat import ChatRequest
from fastserve.openai.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from fastserve.openai.generation import GenerationRequest, check_request, parse_request
from fastserve.openai.template_fields import final_text
from fastserve.openai.tools import ToolUse
from fastserve.protocol import CHOICES_HEADER
from fastserve.text.chat_template import MAX_RENDERED_CHARS, ChatTemplate, RenderedTooLongError
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.answer_forms import AnswerForms
from fastserve.worker.beam_search import BeamSettings
from fastserve.worker.caller import Caller
from fastserve.worker.choice import OutputOptions
from fastserve.worker.encoding import PromptEncoder, cut
from fastserve.worker.fingerprint import Fingerprints
from fastserve.worker.grammars import GrammarMaker
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
    sends_continuous_usage: bool = False
    sends_obfuscation: bool = False
    returns_token_ids: bool = False
    names_tokens_by_id: bool = False
    """Whether tokens of logprobs are named by their ids."""
    echoed: str = ""
    """Text of the final message with which a chat's answer begins."""
    counts_reasoning: bool = False
    """Whether usage has the number of reasoning tokens."""
    has_function_call: bool = False
    """Whether a call is written as `function_call`, for old clients."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that the answer repeats."""


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
    cache_salt: str = ""
    predicted_ids: list[int] | None = None
    """Tokens of the request's prediction; None: it has none."""
    max_running: int = 2**31
    """Runs that the engine gets at once."""
    beams: BeamSettings | None = None
    """For a beam search, in place of num_runs independent runs."""

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
    """Sequences of one request that run at once, and maximum runs of one prompt."""
    max_prompt_logprobs: int
    """Maximum log probabilities of prompt tokens in one answer."""
    bounds: RequestBounds
    sampling_defaults: SamplingDefaults
    template_timeout_s: float
    stream_interval: int
    """Tokens between two deltas of a streamed choice."""
    tool_call_parser: str | None = None
    """None: the form of calls follows from the chat template, as that of reasoning does."""
    reasoning_parser: str | None = None
    trusts_request_templates: bool = False
    """Whether requests may bring a chat template."""
    seed: int | None = None
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
        grammars: GrammarMaker,
    ) -> None:
        """`template`: None if the model has no chat template."""
        self.settings = settings
        self._adapters = adapters
        self._fingerprints = fingerprints
        self._grammars = grammars
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, settings.vocab_size, settings.context_length)
        self._template = template
        source = "" if template is None else template.source
        self.forms = AnswerForms(source, tokenizer, settings.tool_call_parser, settings.reasoning_parser)
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

    def chat_token_ids(self, fields: Mapping[str, Any]) -> list[int]:
        """The prompt of a chat request, of which `model` may be missing."""
        named = {"model": self.settings.model_names[0]} | {k: v for k, v in fields.items() if v is not None}
        request = check_request(ChatRequest, named, self.settings.bounds)
        template = self._require_template(request)
        return self._encode_chat(template, request, request.template_messages(self.settings.bounds))[1]

    def _require_template(self, request: ChatRequest) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequestError(
                f"The model '{request.model}' has no chat template. Use /v1/completions, or start the worker with "
                "--chat-template FILE.",
                param="messages",
            )
        return self._template

    def _chat(self, request: ChatRequest, caller: Caller) -> Job:
        self._check(request, caller)
        template = self._require_template(request)
        self._check_size(1, request)
        messages = request.template_messages(self.settings.bounds)
        use = request.tool_use()
        text, ids = self._encode_chat(template, request, messages)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        max_tokens = self.encoder.max_output_tokens(len(ids), "messages")
        if request.token_limit is not None:
            max_tokens = min(request.token_limit, max_tokens)
        self._check_prompt_logprobs(len(ids), request.prompt_logprobs)
        params = self._params(request, max_tokens, self._pick_seed(caller), logprobs, request.prompt_logprobs)
        echoed = final_text(messages) if request.echo else ""
        continues = bool(request.continue_final_message)
        prompts = [Prompt(None, ids, params)]
        job = self._job(request, caller, prompts, logprobs, echoed=echoed, continues_prompt=continues)
        if template.stops:
            job = replace(job, output=replace(job.output, stops=(*job.output.stops, *template.stops)))
        job = self._with_form(job, request, use, text, final_text(messages) if continues else "")
        if request.prediction is None:
            return job
        text = request.prediction.text(request.model)
        predicted_ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        # Ids beyond the model's vocabulary cannot come, and the answer has no more than max_tokens.
        predicted_ids = [token_id for token_id in predicted_ids if token_id < self.settings.vocab_size]
        return replace(job, predicted_ids=predicted_ids, output=replace(job.output, token_ids=True))

    def _with_form(self, job: Job, request: ChatRequest, use: ToolUse | None, prompt: str, continued: str) -> Job:
        """A chat's job with its tools and reasoning."""
        params = job.prompts[0].params
        form = self.forms.of(request, use, prompt, continued, job.caller.request_id, job.output, params.grammar)
        if form.grammar != params.grammar:
            functions = [] if use is None else use.enforced
            param = functions[0].param.partition(".")[0] if functions else "thinking_token_budget"
            if params.grammar:
                param = "response_format"
            else:
                self._refuse_fixed_length(request, param)
            self._grammars.check_calls(form.grammar, functions, param)
        params = msgspec.structs.replace(params, grammar=form.grammar, thinking=form.thinking)
        has_function_call = use is not None and use.is_old
        return replace(
            job,
            prompts=[replace(job.prompts[0], params=params)],
            output=form.output,
            answer=replace(job.answer, counts_reasoning=form.counts_reasoning, has_function_call=has_function_call),
        )

    def _encode_chat(
        self, template: ChatTemplate, request: ChatRequest, messages: list[dict[str, Any]]
    ) -> tuple[str, list[int]]:
        """The prompt of a chat, as text and as tokens."""
        if request.chat_template is not None:
            template = self._own_template(template, request.chat_template)
        # Templates write the special tokens themselves.
        add_special_tokens = bool(request.add_special_tokens)
        limit = self._max_prompt_tokens(request, request.token_limit or 1)
        text = self._render(template, request, messages, is_cut=limit is not None)
        return text, self.encoder.encode(
            text, "messages", add_special_tokens=add_special_tokens, limit=limit, cuts_end=request.cuts_end
        )

    def _own_template(self, template: ChatTemplate, source: str) -> ChatTemplate:
        if not self.settings.trusts_request_templates:
            raise UnsupportedParameterError(
                "'chat_template' is not allowed here, since templates are programs. Leave it out, or ask whoever runs "
                "this server to start the worker with --trust-request-chat-template.",
                param="chat_template",
            )
        try:
            return template.with_source(source)
        except (StartupError, RecursionError, SyntaxError, ValueError) as error:
            cause = printable(str(error), 300)
            raise InvalidRequestError(f"Invalid value for 'chat_template'. {cause}", param="chat_template") from error

    def _max_prompt_tokens(self, request: GenerationRequest, token_limit: int) -> int | None:
        """Tokens to which the prompt is cut; None: it is not. `token_limit`: maximum tokens of the answer."""
        limit = request.truncate_prompt_tokens
        if limit != -1:
            return limit
        return max(1, self.settings.context_length - token_limit)

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
            ids = self._token_ids(prompt, request, token_limit)
            num_tokens += len(ids)
            self._check_prompt_logprobs(num_tokens, request.num_prompt_logprobs)
            max_tokens = min(token_limit, self.encoder.max_output_tokens(len(ids), "prompt"))
            params = self._params(request, max_tokens, seed, request.logprobs, request.num_prompt_logprobs)
            prompts.append(Prompt(prompt if request.echo and isinstance(prompt, str) else None, ids, params))
        echo = bool(request.echo)
        return self._job(request, caller, prompts, request.logprobs, echo=echo, continues_prompt=continues_prompt)

    def _token_ids(self, prompt: str | list[int], request: CompletionRequest, token_limit: int) -> list[int]:
        limit, cuts_end = self._max_prompt_tokens(request, token_limit), request.cuts_end
        if isinstance(prompt, str):
            add_special_tokens = request.add_special_tokens is not False
            return self.encoder.encode(
                prompt, "prompt", add_special_tokens=add_special_tokens, limit=limit, cuts_end=cuts_end
            )
        ids = prompt if limit is None else cut(prompt, limit, cuts_end=cuts_end)
        self.encoder.check_token_ids(ids, "prompt")
        return ids

    def _render(
        self, template: ChatTemplate, request: ChatRequest, messages: list[dict[str, Any]], *, is_cut: bool
    ) -> str:
        variables = {**request.template_variables(), **(request.chat_template_kwargs or {})}
        use = request.tool_use()
        if request.verbosity is not None:
            variables.setdefault("verbosity", request.verbosity)
        try:
            return template.render(
                messages,
                tools=None if use is None else use.shown,
                documents=request.documents,
                add_generation_prompt=request.begins_new_turn(),
                continue_final_message=bool(request.continue_final_message),
                variables=variables,
                max_chars=MAX_RENDERED_CHARS if is_cut else self.encoder.max_chars,
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
        return self._adapters.require(request.model)

    def _check_size(self, num_prompts: int, request: GenerationRequest) -> None:
        """A request with more sequences than the engine runs at once has them run one after the other, so their number
        is bounded by that of prompts."""
        name = "n" if request.best_of is None else "best_of"
        if request.num_runs > self.settings.max_sequences:
            raise invalid(
                name,
                request.num_runs,
                f"This worker runs at most {self.settings.max_sequences} sequences of one prompt (--max-num-seqs).",
            )
        max_sequences = max(self.settings.bounds.max_prompts, self.settings.max_sequences)
        if num_prompts * request.num_runs > max_sequences:
            raise InvalidRequestError(
                f"Invalid value for '{name}': {num_prompts} prompts, {name}={request.num_runs}. This worker takes at "
                f"most {max_sequences} sequences (prompts times {name}) in one request; split the request.",
                param=name,
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
        num_choices = num_prompts * _num_runs(request)
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
        grammar = self._grammar(request)
        return resolve(
            request,
            self.settings.sampling_defaults,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            eos_token_ids=self.settings.eos_token_ids,
            vocab_size=self.settings.vocab_size,
            bad_token_ids=self._bad_token_ids(request.bad_words or ()),
            grammar=grammar,
        )

    def _grammar(self, request: GenerationRequest) -> str:
        """The grammar of the answer; empty: any text."""
        wanted = request.answer_format(self.settings.bounds)
        if wanted is None:
            return ""
        self._refuse_fixed_length(request, wanted.param)
        return self._grammars.of(wanted)

    def _refuse_fixed_length(self, request: GenerationRequest, param: str) -> None:
        """Refuse fields that keep an answer from ending, beside the field `param`, which asks for a grammar."""
        for name, value in (("min_tokens", request.min_tokens), ("ignore_eos", request.ignore_eos)):
            if value:
                raise invalid(name, value, f"With '{param}' a grammar says when the answer ends: leave it out.")

    def _bad_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of texts that must not come, in the middle of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                if ids and max(ids) < self.settings.vocab_size:
                    found[ids] = None
        return tuple(found)

    def _job(
        self,
        request: GenerationRequest,
        caller: Caller,
        prompts: list[Prompt],
        logprobs: int | None,
        *,
        echo: bool = False,
        echoed: str = "",
        continues_prompt: bool,
    ) -> Job:
        self._report_unknown(request.unknown)
        if request.request_id is not None:
            caller = replace(caller, request_id=request.request_id)
        adapter = self._adapter_of(request)
        output = OutputOptions(
            stops=request.stop or (),
            skip_special_tokens=request.skip_special_tokens is not False,
            continues_prompt=continues_prompt,
            include_stop=bool(request.include_stop_str_in_output),
            interval=(request.stream_interval or self.settings.stream_interval) if request.stream else _NO_INTERVAL,
            token_ids=bool(request.return_token_ids),
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
            sends_continuous_usage=request.sends_continuous_usage,
            sends_obfuscation=request.sends_obfuscation,
            returns_token_ids=bool(request.return_token_ids),
            names_tokens_by_id=bool(request.return_tokens_as_token_ids),
            echoed=echoed,
            extra={} if request.service_tier is None else {"service_tier": request.service_tier},
        )
        choices = self._pick_choices(request, caller, len(prompts))
        return Job(
            *(caller, prompts, _num_runs(request), request.num_choices, choices),
            *(output, request.priority or 0, answer, adapter, request.cache_salt or ""),
            max_running=self.settings.max_sequences,
            beams=self._beams(request),
        )

    def _beams(self, request: GenerationRequest) -> BeamSettings | None:
        if not request.use_beam_search:
            return None
        length_penalty = 1.0 if request.length_penalty is None else request.length_penalty
        stop_token_ids = () if request.ignore_eos else self.settings.eos_token_ids
        return BeamSettings(
            request.num_runs, length_penalty, frozenset((*(request.stop_token_ids or ()), *stop_token_ids))
        )

    def _report_unknown(self, names: Sequence[str]) -> None:
        # Bounded in number and length: the names come from clients.
        for name in names:
            label = printable(name, 100)
            if label not in self._unknown_fields and len(self._unknown_fields) < _MAX_UNKNOWN_NAMES:
                self._unknown_fields.add(label)
                logger.warning("request field '%s' is not known and has no effect (logged once)", label)
            self._metrics.unknown_fields.labels(label if label in self._unknown_fields else "other").inc()


def _num_runs(request: GenerationRequest) -> int:
    """Runs of each prompt. A beam search returns the best of its beams itself."""
    return request.num_choices if request.use_beam_search else request.num_runs
