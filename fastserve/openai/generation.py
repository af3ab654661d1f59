"""Fields that chat and completion requests share, with OpenAI's ranges. Null is the same as a missing field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fastserve.openai.body import Flag, Integer, Number, RequestBounds, bounds_of, invalid, join, read_fields, validate
from fastserve.openai.parameters import REQUEST_FIELDS, STREAM_OPTIONS_FIELDS, KnownFields
from fastserve.openai.structured import StructuredFields

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_COUNT = 2**31 - 1
"""Maximum for numbers of tokens; more would be no limit at all."""
MIN_PRIORITY, MAX_PRIORITY = -100, 100
_MAX_BIAS = 100.0

RequestT = TypeVar("RequestT", bound="GenerationRequest")
_TOKEN_ID = re.compile(r"-?[0-9]{1,18}")
Penalty = Annotated[Number, Field(ge=-2, le=2)]


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
    model_config = ConfigDict(extra="allow")
    include_usage: Flag | None = None


class GenerationRequest(StructuredFields):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = Field(None, ge=1)
    n: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: Integer | None = Field(None, ge=1, le=MAX_CHOICES)
    """Number of choices to generate. The n with the highest mean logprob of their tokens are returned."""
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    """0 is greedy."""
    top_k: Integer | None = Field(None, ge=-1, le=MAX_COUNT)
    """-1 or 0 is off."""
    min_p: Number | None = Field(None, ge=0, le=1)
    typical_p: Number | None = Field(None, gt=0, le=1)
    """1 is off."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] | None = None
    include_stop_str_in_output: Flag | None = None
    stop_token_ids: tuple[int, ...] | None = None
    add_special_tokens: Flag | None = None
    """Whether the tokenizer adds its special tokens (BOS) to the text of the prompt. Default: on for completions, off
    for chats, whose template writes them."""
    skip_special_tokens: Flag | None = None
    """Whether special tokens have no text in the answer. Default: on."""
    min_tokens: Integer | None = Field(None, ge=0, le=MAX_COUNT)
    ignore_eos: Flag | None = None
    prompt_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Number of top logprobs to return at each position of the prompt, besides that of the prompt's token."""
    priority: Integer | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first. The default is 0."""

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
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid("stop_token_ids", value, "Give an array of token ids.")
        max_ids = bounds_of(info).max_stop_token_ids
        if len(value) > max_ids:
            raise invalid("stop_token_ids", value, f"Give at most {max_ids} token ids (--max-stop-token-ids).")
        for token_id in value:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise invalid("stop_token_ids", token_id, "Give an array of token ids, which are integers.")
        return tuple(value)

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
            raise invalid("stream_options", {"include_usage": self.wants_usage}, "It is allowed with stream=true only.")
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

    def undeclared(self) -> Iterator[tuple[str, KnownFields, Mapping[str, Any]]]:
        """Fields that the schemas do not declare, by object: its path for errors, its known fields, and the fields."""
        yield "", REQUEST_FIELDS, self.model_extra or {}
        if self.stream_options is not None:
            yield "stream_options.", STREAM_OPTIONS_FIELDS, self.stream_options.model_extra or {}

    @property
    def unknown(self) -> list[str]:
        """Paths of unknown fields, without the indices of messages and without duplicates."""
        return list(dict.fromkeys(name for _, known, extra in self.undeclared() for name in known.unknown(extra)))
