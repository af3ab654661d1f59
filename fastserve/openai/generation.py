"""Fields that chat and completion requests share, with OpenAI's ranges. Null is the same as a missing field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fastserve.openai.accepted import AcceptedFields
from fastserve.openai.body import Flag, Integer, Number, RequestBounds, bounds_of, invalid, join, read_fields, validate
from fastserve.openai.parameters import REQUEST_FIELDS, STREAM_OPTIONS_FIELDS, KnownFields
from fastserve.openai.structured import StructuredFields

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_BEAMS = 32
MAX_BAD_WORDS = 128
MAX_SALT_CHARS = 1024
MAX_ID_CHARS = 128
MAX_COUNT = 2**31 - 1
"""Maximum for numbers of tokens; more would be no limit at all."""
MIN_PRIORITY, MAX_PRIORITY = -100, 100
_MAX_BIAS = 100.0

RequestT = TypeVar("RequestT", bound="GenerationRequest")
_REQUEST_ID = re.compile(rf"[A-Za-z0-9_.:-]{{1,{MAX_ID_CHARS}}}")
_TOKEN_ID = re.compile(r"-?[0-9]{1,18}")
Penalty = Annotated[Number, Field(ge=-2, le=2)]


_NOT_WITH_BEAMS = (
    *("stream", "temperature", "top_p", "top_k", "min_p", "typical_p", "logprobs", "prompt_logprobs", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words", "min_tokens"),
    *("prediction", "echo", "continue_final_message", "response_format", "structured_outputs", "tools", "functions"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema", "regex", "ebnf"),
    "thinking_token_budget",
)
_NEUTRAL_WITH_BEAMS = {
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_tokens": 0,
}


def _read_token_ids(name: str, value: Any, max_ids: int, flag: str) -> Any:
    """An array of token ids as a tuple. Raises InvalidRequestError."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise invalid(name, value, "Give an array of token ids.")
    if len(value) > max_ids:
        raise invalid(name, value, f"Give at most {max_ids} token ids ({flag}).")
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise invalid(name, token_id, "Give an array of token ids, which are integers.")
    return tuple(value)


def parse_request(request_class: type[RequestT], body: bytes, bounds: RequestBounds) -> RequestT:
    """Parse and validate a body. Raises InvalidRequestError or UnsupportedParameterError."""
    known = request_class.model_fields.keys() | REQUEST_FIELDS.unsupported.keys()
    return check_request(request_class, read_fields(body, bounds, known), bounds)


def check_request(request_class: type[RequestT], fields: Mapping[str, Any], bounds: RequestBounds) -> RequestT:
    """Validate the fields of a request. Raises InvalidRequestError or UnsupportedParameterError."""
    request = validate(request_class, fields, bounds)
    for path, known, extra in request.undeclared():
        known.refuse_unsupported(extra, path)
    request.check()
    return request


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    include_usage: Flag | None = None
    """Whether a last chunk without choices has the usage."""
    continuous_usage_stats: Flag | None = None
    """With include_usage: whether every chunk has the usage so far."""
    include_obfuscation: Flag | None = None
    """Whether each chunk has a field `obfuscation` with random characters that makes its length a multiple of 64 bytes,
    so that who sees the lengths of packets learns less of the text. Default: off."""


class GenerationRequest(StructuredFields, AcceptedFields):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """Name of a model or of an adapter."""
    stream: Flag | None = None
    """Whether the answer comes as server-sent events, the last of them `[DONE]`."""
    stream_options: StreamOptions | None = None
    """With stream: what its chunks contain."""
    max_tokens: Integer | None = Field(None, ge=1)
    """Maximum tokens of an answer, lowered to what the context leaves. Default: what it leaves."""
    n: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    """Number of choices for each prompt. Default: 1."""
    best_of: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    """Number of choices to generate. The n with the highest mean logprob of their tokens are returned."""
    temperature: Number | None = Field(None, ge=0, le=2)
    """0 is greedy. Default: the model's own (generation_config.json), as for the next four, else 1."""
    top_p: Number | None = Field(None, ge=0, le=1)
    """0 is greedy."""
    top_k: Integer | None = Field(None, ge=-1, le=MAX_COUNT)
    """-1 or 0 is off."""
    min_p: Number | None = Field(None, ge=0, le=1)
    """Tokens less likely than this share of the likeliest one are not sampled; 0 is off."""
    typical_p: Number | None = Field(None, gt=0, le=1)
    """1 is off."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logits of tokens that the answer has. Default: 0."""
    frequency_penalty: Penalty | None = None
    """Subtracted from a token's logit for each time that the answer has it. Default: 0."""
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    """Divides the positive logits, and multiplies the negative ones, of tokens of prompt and answer; 1 is off."""
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    """Makes the answer repeatable."""
    logit_bias: dict[int, float] | None = None
    """Numbers from -100 to 100 that are added to the logits of the tokens with these ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens are sampled. The end of the answer is one of them only if its token is."""
    bad_words: tuple[str, ...] | None = None
    """Texts that the answer does not contain, as the tokenizer splits them with and without a space before."""
    stop: tuple[str, ...] | None = None
    """Text, or up to 16 texts, that end the answer."""
    include_stop_str_in_output: Flag | None = None
    """Whether the answer contains the text of `stop` that ended it. Default: off."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end the answer, besides the model's own."""
    add_special_tokens: Flag | None = None
    """Whether the tokenizer adds its special tokens (BOS) to the text of the prompt. Default: on for completions, off
    for chats, whose template writes them."""
    skip_special_tokens: Flag | None = None
    """Whether special tokens have no text in the answer. Default: on."""
    min_tokens: Integer | None = Field(None, ge=0, le=MAX_COUNT)
    """Nothing ends the answer before so many tokens. Default: 0."""
    ignore_eos: Flag | None = None
    """Whether the model's own end tokens do not end the answer. Default: off."""
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Number of top logprobs to return at each position of the prompt, besides that of the prompt's token."""
    priority: Integer | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first. Default: 0."""
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1, le=MAX_COUNT)
    """Maximum tokens of the prompt, of which the rest is cut off; -1: as many as the context leaves for it beside
    max_tokens. Default: a prompt that is too long is refused."""
    truncation_side: Literal["left", "right"] | None = None
    """The side at which the prompt is cut off. Default: left, its beginning."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    """Only requests with the same text here share the KV cache of this prompt, so that nobody else can find out by the
    time of an answer that it was sent."""
    return_token_ids: Flag | None = None
    """Whether the answer has `prompt_token_ids`, and each choice or chunk its `token_ids`."""
    return_tokens_as_token_ids: Flag | None = None
    """Whether tokens of logprobs are named `token_id:ID`. Several tokens may have the same text, none the same id."""
    stream_interval: Integer | None = Field(None, ge=1, le=MAX_COUNT)
    """Tokens between two chunks of a stream. Default: the worker's --stream-interval."""
    request_id: str | None = None
    """The id of the request, which the answer's `id` ends in. Default: that of the header x-request-id, else random."""
    use_beam_search: Flag | None = None
    """Whether the n best answers are searched for (beam search with `best_of` or `n` beams) instead of sampled. Not
    with stream, nor with fields that change probabilities."""
    length_penalty: Number | None = Field(None, ge=-10, le=10)
    """With use_beam_search: answers are ranked by the sum of their logprobs, divided by their length to this power.
    Default: 1."""

    @field_validator("stop", mode="before")
    @classmethod
    def _read_stop(cls, value: Any, info: ValidationInfo) -> Any:
        stops = [value] if isinstance(value, str) else value
        if stops is None:
            return None
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise invalid("stop", value, f"Give a string or an array of up to {MAX_STOPS} strings, none of them empty.")
        max_chars = bounds_of(info).max_stop_chars
        for stop in stops:
            if len(stop) > max_chars:
                raise invalid("stop", stop, f"A stop string has at most {max_chars} characters (--max-stop-chars).")
        return tuple(stops)

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _read_stop_token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        return _read_token_ids("stop_token_ids", value, bounds_of(info).max_stop_token_ids, "--max-stop-token-ids")

    @field_validator("allowed_token_ids", mode="before")
    @classmethod
    def _read_allowed_token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        if value == []:
            raise invalid("allowed_token_ids", value, "Give at least one token id, or leave it out.")
        return _read_token_ids("allowed_token_ids", value, bounds_of(info).max_logit_bias, "--max-logit-bias")

    @field_validator("bad_words", mode="before")
    @classmethod
    def _read_bad_words(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > MAX_BAD_WORDS:
            raise invalid("bad_words", value, f"Give an array of up to {MAX_BAD_WORDS} strings.")
        max_chars = bounds_of(info).max_stop_chars
        for word in value:
            if not isinstance(word, str) or not word.strip() or len(word) > max_chars:
                remedy = f"Give a string of at most {max_chars} characters (--max-stop-chars), not only blanks."
                raise invalid("bad_words", word, remedy)
        return tuple(value)

    @field_validator("request_id", mode="after")
    @classmethod
    def _check_request_id(cls, value: str | None) -> str | None:
        if value is not None and not _REQUEST_ID.fullmatch(value):
            remedy = f"Give 1 to {MAX_ID_CHARS} letters, digits, dots, colons, hyphens or underscores."
            raise invalid("request_id", value, remedy)
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _read_logit_bias(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid("logit_bias", value, "Give an object that maps token ids to numbers from -100 to 100.")
        max_ids = bounds_of(info).max_logit_bias
        if len(value) > max_ids:
            raise invalid("logit_bias", value, f"Give at most {max_ids} token ids (--max-logit-bias).")
        biases = {}
        for token_id, bias in value.items():
            if not _TOKEN_ID.fullmatch(token_id):
                raise invalid("logit_bias", token_id, 'Its names are token ids, such as "42".')
            if not isinstance(bias, int | float) or isinstance(bias, bool) or not -_MAX_BIAS <= bias <= _MAX_BIAS:
                raise invalid(join("logit_bias", token_id), bias, "Give a number from -100 to 100.")
            biases[int(token_id)] = float(bias)
        return biases

    def check(self) -> None:
        """Validate combinations of fields."""
        if self.stream_options is not None and not self.stream:
            given = self.stream_options.model_dump(exclude_unset=True)
            raise invalid("stream_options", given, "It is allowed with stream=true only.")
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens", 0, "Give at least 1, or -1 for what the context leaves.")
        if self.use_beam_search:
            self._check_beam_search()
        if self.min_tokens and self.token_limit is not None and self.min_tokens > self.token_limit:
            raise invalid("min_tokens", self.min_tokens, f"It may not exceed max_tokens, which is {self.token_limit}.")
        if self.best_of is not None and self.best_of < self.num_choices:
            raise invalid("best_of", self.best_of, f"It may not be less than n, which is {self.num_choices}.")
        if self.stream and self.num_runs > self.num_choices:
            raise invalid(
                "best_of",
                self.best_of,
                f"With stream=true it may not exceed n, which is {self.num_choices}: the best are known at the end.",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise invalid(
                "prompt_logprobs", self.prompt_logprobs, "It is returned in whole answers only: leave out stream."
            )

    def _check_beam_search(self) -> None:
        if self.num_runs > MAX_BEAMS:
            name = "n" if self.best_of is None else "best_of"
            raise invalid(name, self.num_runs, f"With use_beam_search it may not exceed {MAX_BEAMS}.")
        for name in _NOT_WITH_BEAMS:
            value = getattr(self, name, None)
            if value is not None and value is not False and value != _NEUTRAL_WITH_BEAMS.get(name):
                raise invalid(name, value, "It has no meaning with use_beam_search: leave out one of the two.")

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices to return for each prompt."""
        return self.n or 1

    @property
    def num_runs(self) -> int:
        """Choices to generate for each prompt."""
        return self.best_of or self.num_choices

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def cuts_end(self) -> bool:
        """Whether truncate_prompt_tokens cuts the end of the prompt instead of its beginning."""
        return self.truncation_side == "right"

    @property
    def sends_continuous_usage(self) -> bool:
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def sends_obfuscation(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_obfuscation)

    def undeclared(self) -> Iterator[tuple[str, KnownFields, Mapping[str, Any]]]:
        """Fields that the schemas do not declare, by object: its path for errors, its known fields, and the fields."""
        yield "", REQUEST_FIELDS, self.model_extra or {}
        if self.stream_options is not None:
            yield "stream_options.", STREAM_OPTIONS_FIELDS, self.stream_options.model_extra or {}

    @property
    def unknown(self) -> list[str]:
        """Paths of unknown fields, without the indices of messages and without duplicates."""
        return list(dict.fromkeys(name for _, known, extra in self.undeclared() for name in known.unknown(extra)))
