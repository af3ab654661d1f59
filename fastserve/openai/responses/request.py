"""Schema of a /v1/responses request. Null is the same as a missing field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fastserve.errors import InvalidRequestError, UnsupportedParameterError
from fastserve.openai.body import (
    Flag,
    Integer,
    Number,
    RequestBounds,
    bounds_of,
    field_error,
    invalid,
    read_fields,
    validate,
)
from fastserve.openai.generation import MAX_COUNT, MAX_TOP_LOGPROBS
from fastserve.openai.parameters import KnownFields

MIN_OUTPUT_TOKENS = 16
MAX_TOOLS = 512
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""All but the first name contents that the answers of open models do not have."""

PASSED_ON = (
    *("top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"),
    *("logit_bias", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "min_tokens"),
    *("ignore_eos", "priority", "chat_template_kwargs"),
)
"""Fields of a chat request that OpenAI's Responses API lacks; they mean the same here."""

_CHAT_NAMES = {
    "functions": "tools",
    "logprobs": f"include=['{LOGPROBS}']",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""Fields of a chat request that have another name here: ignored, they would mislead."""
REQUEST_FIELDS = KnownFields(
    "",
    frozenset(
        {
            *("client_metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
            *("safety_identifier", "user"),
            *PASSED_ON,
        }
    ),
    {
        **dict.fromkeys(_CHAT_NAMES, ()),
        "context_management": ([],),
        "moderation": (),
        "n": (1,),
        "prompt": (),
        "service_tier": ("auto", "default"),
    },
    {
        "prompt": "Send its text as 'instructions' and 'input'.",
        **{name: f"The Responses API has '{theirs}' instead." for name, theirs in _CHAT_NAMES.items()},
    },
)
_LONG_FIELDS = frozenset({"input", "instructions"})


class StreamOptions(BaseModel):
    include_obfuscation: Flag | None = None
    """Whether deltas carry a random string, so that their lengths do not give away the text."""


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())
    type: Literal["text", "json_object", "json_schema"]
    """json_schema: the answer follows `schema`."""
    name: str | None = None
    """Name of the schema, which the answer returns."""
    schema_: Any = Field(None, alias="schema")
    """A JSON schema."""
    strict: Flag | None = None
    """Returned in the answer; the schema is always followed."""
    description: str | None = None
    """Returned in the answer."""


class TextOptions(BaseModel):
    format: TextFormat | None = None
    """Format of the answer. Default: text."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted; no effect: no open model has it."""


class ReasoningOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """The same as `reasoning_effort` of a chat."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted; no effect: the answer has the reasoning itself."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted; no effect: the older name of summary."""


class ConversationRef(BaseModel):
    id: str
    """Id of a conversation that was created with /v1/conversations."""


class ResponsesRequest(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    """Name of a model or of an adapter."""
    input: Any = None
    """A string, or a list of items."""
    instructions: str | None = None
    """The system message of this response alone: later responses do not inherit it."""
    stream: Flag | None = None
    """Whether the answer comes as typed server-sent events."""
    stream_options: StreamOptions | None = None
    """With stream: what its events contain."""
    store: Flag | None = None
    """Whether the response is stored. Default: on."""
    background: Flag | None = None
    """Whether the response is answered at once, and generated behind it. Needs store."""
    previous_response_id: str | None = None
    """A stored response whose input and output come before this input."""
    conversation: ConversationRef | None = None
    """A conversation, or its id: its items come before the input, and input and output are added to it."""
    max_output_tokens: Integer | None = Field(None, ge=MIN_OUTPUT_TOKENS)
    """Maximum tokens of reasoning and answer together."""
    max_tool_calls: Integer | None = Field(None, ge=1, le=MAX_COUNT)
    """Accepted; no effect: it counts calls of hosted tools."""
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions and custom tools that the model may call. Hosted tools are left out or refused (responses.md)."""
    tool_choice: Any = None
    """`auto`, `none`, `required`, or an object."""
    parallel_tool_calls: Flag | None = None
    """Whether an answer may have several calls. Default: on."""
    text: TextOptions | None = None
    """Format and verbosity of the answer."""
    reasoning: ReasoningOptions | None = None
    """How much the model reasons."""
    include: Annotated[list[Literal[INCLUDES]], Field(max_length=64, fail_fast=True)] | None = None  # type: ignore[valid-type]
    """`message.output_text.logprobs` adds logprobs to the answer; the others have no effect."""
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Number of likeliest tokens at each place of the logprobs."""
    temperature: Number | None = Field(None, ge=0, le=2)
    """0 is greedy. Default: the model's own, else 1."""
    top_p: Number | None = Field(None, ge=0, le=1)
    """0 is greedy. Default: the model's own, else 1."""
    truncation: Literal["auto", "disabled"] | None = None
    """disabled (the default): input that is too long is refused. auto is refused by name."""
    metadata: dict[str, str] | None = None
    """Up to 16 names of at most 64 characters, with texts of at most 512; stored with the response."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _check_metadata(cls, value: Any) -> Any:
        return check_metadata(value)

    @field_validator("input", mode="before")
    @classmethod
    def _count_items(cls, value: Any, info: ValidationInfo) -> Any:
        max_items = bounds_of(info).max_messages
        if isinstance(value, list) and len(value) > max_items:
            raise field_error(f"Send at most {max_items} items in one request (--max-messages).")
        return value

    @field_validator("conversation", mode="before")
    @classmethod
    def _read_conversation(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str | dict):
            raise field_error('Give the id of a conversation, or {"id": ...}.')
        return {"id": value} if isinstance(value, str) else value

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def conversation_id(self) -> str | None:
        return None if self.conversation is None else self.conversation.id

    def check(self) -> None:
        """Raises InvalidRequestError for fields that do not fit each other, or cannot be honoured."""
        REQUEST_FIELDS.refuse_unsupported(self.model_extra or {}, "")
        if self.input is None:
            raise InvalidRequestError(
                "Missing required field 'input': a string, or an array of items.",
                param="input",
                code="missing_required_parameter",
            )
        if self.previous_response_id is not None and self.conversation is not None:
            raise invalid(
                "previous_response_id",
                self.previous_response_id,
                "It cannot be given with 'conversation': leave out one of them.",
            )
        if self.background and self.store is False:
            raise invalid("background", True, "It needs store=true, since its answer is fetched from the store.")
        if self.truncation == "auto":
            raise UnsupportedParameterError(
                "'truncation' is not supported (given: \"auto\"): no item is dropped unasked. Leave it out, and send "
                "fewer items if they exceed the context.",
                param="truncation",
            )
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", {}, "It is allowed with stream=true only.")

    @property
    def unknown(self) -> Sequence[str]:
        """Names of fields that are neither declared nor known."""
        return REQUEST_FIELDS.unknown(self.model_extra or {})


def check_metadata(value: Any) -> Any:
    """A pydantic validator's body: at most 16 pairs of short strings. Raises PydanticCustomError."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise field_error(f"Give an object of up to {MAX_METADATA} strings.")
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY_CHARS or not isinstance(text, str) or len(text) > MAX_METADATA_VALUE_CHARS:
            raise field_error(
                f"Its names have at most {MAX_METADATA_KEY_CHARS} characters, and its values are strings of at most "
                f"{MAX_METADATA_VALUE_CHARS}."
            )
    return value


def read_request(body: bytes, bounds: RequestBounds) -> ResponsesRequest:
    """Parse and validate a body. Raises InvalidRequestError or UnsupportedParameterError."""
    known = ResponsesRequest.model_fields.keys() | REQUEST_FIELDS.unsupported.keys() | set(PASSED_ON)
    request = validate(ResponsesRequest, read_fields(body, bounds, known, _LONG_FIELDS), bounds)
    request.check()
    return request
