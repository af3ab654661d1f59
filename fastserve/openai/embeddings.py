"""Schemas of requests for vectors and scores: embeddings, rerank, score, classify, pooling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fastserve.errors import InvalidRequestError
from fastserve.openai.body import Flag, Integer, RequestBounds, invalid, join, read_fields, renamed, validate
from fastserve.openai.completions import CompletionRequest
from fastserve.openai.generation import MAX_COUNT, MAX_PRIORITY, MIN_PRIORITY
from fastserve.openai.parameters import KnownFields

MAX_DIMENSIONS = 1_000_000
_TEXT_LISTS = ("documents", "items", "queries", "text_1", "text_2", "data_1", "data_2")
_LONG_FIELDS = frozenset({"input", "query", *_TEXT_LISTS})
"""Fields that may be as long as the whole body."""
_STRINGS_PER_TEXT = 4
"""Strings of a document that is an object."""
KNOWN_FIELDS = KnownFields(
    "",
    frozenset({"user", "metadata", "cache_salt", "safety_identifier", "store"}),
    {
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "embedding_types": (["float"],),
        "images": ([],),
        "late_chunking": (False,),
        "messages": ([],),
        "mm_processor_kwargs": ({},),
        "padding": (False,),
        "rank_fields": (["text"],),
        "softmax": (),
        "truncation_side": ("right",),
    },
    {"messages": "Send the texts as 'input'.", "softmax": "Say 'use_activation': true or false."},
)


class PoolingFields(BaseModel):
    """Fields that all these requests have."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    """Name of a model or of an adapter."""
    truncate_prompt_tokens: Integer | None = Field(None, ge=-1, le=MAX_COUNT)
    """Cut longer texts to so many tokens; -1: to what the model takes."""
    priority: Integer | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first. The default is 0."""

    def check(self) -> None:
        """Validate combinations of fields."""
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens", 0, "Give at least 1, or -1 for what the model takes.")


class EmbeddingFields(PoolingFields):
    input: Any
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: each vector is the text of its float32 numbers. Default: float, a list."""
    dimensions: Integer | None = Field(None, ge=1, le=MAX_DIMENSIONS)
    """Numbers of each vector that are kept, of models whose first numbers say most (Matryoshka)."""
    normalize: Flag | None = None
    """Whether vectors have length 1; the default is as the model was trained."""
    add_special_tokens: Flag | None = None
    """Whether the tokenizer adds its special tokens (BOS, CLS). Default: on."""
    prompt_name: str | None = None
    """Name of one of the model's prompts, to put before each text."""
    input_type: str | None = None
    """The same in others' words: query or document, search_query or search_document, passage."""

    def check(self) -> None:
        super().check()
        if self.prompt_name is not None and self.input_type is not None:
            raise invalid("input_type", self.input_type, "It says the same as prompt_name: give one of them.")


class EmbeddingRequest(EmbeddingFields):
    """Body of /v1/embeddings."""


class PoolRequest(EmbeddingFields):
    """Body of /v1/pooling."""

    task: Literal["embed", "token_embed", "classify"] | None = None
    """Kind of results. Default: a vector or the scores for each text."""
    use_activation: Flag | None = None
    """Whether scores are probabilities (the default), or logits."""


class RerankRequest(PoolingFields):
    """Body of /v1/rerank and /v2/rerank."""

    query: str
    """Text that the documents are compared with."""
    documents: Any
    """A list of strings, or of objects with `text`."""
    top_n: Integer | None = Field(None, ge=1, le=MAX_COUNT)
    """Only so many documents are returned. Default: all."""
    return_documents: Flag | None = None
    """Whether the answer has the texts of the documents. Default: on in Jina's form, off in Cohere's."""
    max_tokens_per_doc: Integer | None = Field(None, ge=1, le=MAX_COUNT)
    """truncate_prompt_tokens for the documents alone."""
    use_activation: Flag | None = None
    """Whether scores are probabilities (the default), or logits."""


class ScoreRequest(PoolingFields):
    """Body of /v1/score: two lists of texts of one length, or a single text and a list."""

    text_1: Any = None
    """Texts of the first side: one, or as many as the second side has."""
    text_2: Any = None
    """Texts of the second side."""
    queries: Any = None
    """Another name of text_1."""
    documents: Any = None
    """Another name of text_2."""
    items: Any = None
    """Another name of text_2."""
    data_1: Any = None
    """Another name of text_1."""
    data_2: Any = None
    """Another name of text_2."""
    use_activation: Flag | None = None
    """Whether scores are probabilities (the default), or logits."""

    def sides(self, bounds: RequestBounds) -> list[tuple[str, list[str]]]:
        """Name and texts of both sides. Raises InvalidRequestError."""
        first = _only(self, ("text_1", "queries", "data_1"))
        second = _only(self, ("text_2", "documents", "items", "data_2"))
        sides = [(name, read_texts(getattr(self, name), name, bounds)) for name in (first, second)]
        num_first, num_second = len(sides[0][1]), len(sides[1][1])
        if num_first not in (1, num_second):
            raise InvalidRequestError(
                f"Invalid value for '{first}': it has {num_first} texts, and '{second}' has {num_second}. Give one, "
                "or as many.",
                param=first,
            )
        return sides


class ClassifyRequest(PoolingFields):
    """Body of /v1/classify."""

    input: Any
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    use_activation: Flag | None = None
    """Whether scores are probabilities (the default), or logits."""
    add_special_tokens: Flag | None = None
    """Whether the tokenizer adds its special tokens (BOS, CLS). Default: on."""


PoolingT = TypeVar("PoolingT", bound=PoolingFields)


def parse_pooling_request(
    request_class: type[PoolingT],
    body: bytes,
    bounds: RequestBounds,
    *,
    model: str | None = None,
    default_model: str = "",
) -> PoolingT:
    """Parse and validate a body. `model`: from the path, in place of the body's. `default_model`: of a body that may
    name none. Raises InvalidRequestError or UnsupportedParameterError."""
    known = request_class.model_fields.keys() | KNOWN_FIELDS.unsupported.keys()
    wider = replace(bounds, max_prompts=_STRINGS_PER_TEXT * bounds.max_prompts)
    fields = read_fields(body, wider, known, _LONG_FIELDS)
    if model or default_model:
        fields["model"] = model or fields.get("model") or default_model
    request = validate(request_class, fields, bounds)
    KNOWN_FIELDS.refuse_unsupported(request.model_extra or {}, "")
    request.check()
    return request


BodyT = TypeVar("BodyT", bound=BaseModel)


def read_ollama(request_class: type[BodyT], body: bytes, bounds: RequestBounds) -> BodyT:
    """Parse and validate a body of Ollama's. Raises InvalidRequestError."""
    return validate(request_class, read_fields(body, bounds, request_class.model_fields, {"input", "prompt"}), bounds)


def read_inputs(value: Any, bounds: RequestBounds) -> list[str | list[int]]:
    """Each text or its token ids of `input`. Raises InvalidRequestError."""
    try:
        inputs = CompletionRequest.model_construct(prompt=value).prompts(bounds)
    except InvalidRequestError as error:
        raise renamed(error, {"prompt": "input"}) from error
    for index, text in enumerate(inputs):
        if text == "":
            raise invalid("input" if isinstance(value, str) else f"input.{index}", "", "Give at least one character.")
    return inputs


def read_texts(value: Any, name: str, bounds: RequestBounds) -> list[str]:
    """The texts of a string, or of a list of strings and of objects with `text`. Raises InvalidRequestError."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise invalid(name, value, "Give a string, or an array of strings or of objects with 'text'.")
    if len(items) > bounds.max_prompts:
        raise invalid(name, value, f"Send at most {bounds.max_prompts} in one request (--max-prompts).")
    texts = []
    for index, item in enumerate(items):
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str) or not text:
            where = name if isinstance(value, str) else join(name, index)
            raise invalid(where, item, "Give a string that is not empty, or an object with it as 'text'.")
        texts.append(text)
    return texts


def _only(request: BaseModel, names: tuple[str, ...]) -> str:
    """The one of these fields that is given."""
    given = [name for name in names if getattr(request, name) is not None]
    if not given:
        raise InvalidRequestError(
            f"Missing required field '{names[0]}'.", param=names[0], code="missing_required_parameter"
        )
    if len(given) > 1:
        raise InvalidRequestError(f"'{given[1]}' says the same as '{given[0]}': give one of them.", param=given[1])
    return given[0]
