"""The fields that chat and completion requests share, with OpenAI's ranges. Null means: not given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastserve.errors import InvalidRequestError
from fastserve.openai.parameters import OF_REQUEST, OF_STREAM_OPTIONS, KnownFields

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MOST_URGENT, LEAST_URGENT = -100, 100
_MAX_BIAS = 100.0

RequestT = TypeVar("RequestT", bound="GenerationRequest")
Penalty = Annotated[float, Field(ge=-2, le=2)]


def invalid(name: str, value: Any, remedy: str) -> InvalidRequestError:
    """An error that names field, value and remedy."""
    shown = repr(value)
    return InvalidRequestError(
        f"Invalid value for '{name}': {shown if len(shown) <= 80 else shown[:77] + '...'}. {remedy}", param=name
    )


def parse_request(request_class: type[RequestT], body: bytes) -> RequestT:
    """Read a request's body. Raises RequestValidationError, InvalidRequestError or UnsupportedParameterError."""
    try:
        request = request_class.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error
    for where, known, given in request.undeclared():
        known.refuse_unsupported(given, where)
    request.check()
    return request


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Choices that are generated; the n of them with the highest mean log probability of a token are the answer."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    """0 is greedy."""
    top_k: int | None = Field(None, ge=-1)
    """-1 or 0 is off."""
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    """1 is off."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """How many of the likeliest tokens are told at each place of the prompt, beside the prompt's own."""
    priority: int | None = Field(None, ge=MOST_URGENT, le=LEAST_URGENT)
    """Lower runs first; 0 when not given."""

    @field_validator("stop", mode="before")
    @classmethod
    def _read_stop(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if stops is None:
            return None
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise invalid("stop", value, f"Give a string or a list of up to {MAX_STOPS} strings, none of them empty.")
        return tuple(stops)

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[int, float] | None) -> dict[int, float] | None:
        for token_id, bias in (value or {}).items():
            if not -_MAX_BIAS <= bias <= _MAX_BIAS:
                raise invalid(f"logit_bias.{token_id}", bias, "Give a number from -100 to 100.")
        return value

    def check(self) -> None:
        """What concerns more than one field."""
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
                "prompt_logprobs", self.prompt_logprobs, "It is told in whole answers only: leave out stream."
            )

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """How many are told."""
        return self.n or 1

    @property
    def num_runs(self) -> int:
        """How many are generated."""
        return self.best_of or self.num_choices

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def undeclared(self) -> Iterator[tuple[str, KnownFields, Mapping[str, Any]]]:
        """The fields that no schema declares, place by place; first its name in errors."""
        yield "", OF_REQUEST, self.model_extra or {}
        if self.stream_options is not None:
            yield "stream_options.", OF_STREAM_OPTIONS, self.stream_options.model_extra or {}

    @property
    def unknown(self) -> list[str]:
        """Each name once, without the numbers of messages."""
        return list(dict.fromkeys(name for _, known, given in self.undeclared() for name in known.unknown(given)))
