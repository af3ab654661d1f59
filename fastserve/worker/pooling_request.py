"""From a request's body to a job for a model that pools."""

from __future__ import annotations

import array
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.engine.contract import PoolingInfo, PoolingRequest, PoolingResult, PoolingTask
from fastserve.engine.settings import PoolingOptions
from fastserve.errors import InvalidRequestError, PermissionDeniedError, UnsupportedParameterError
from fastserve.observability.text import printable
from fastserve.openai.body import RequestBounds, invalid, renamed, validate
from fastserve.openai.embeddings import (
    ClassifyRequest,
    EmbeddingFields,
    EmbeddingRequest,
    PoolingFields,
    PoolRequest,
    RerankRequest,
    ScoreRequest,
    parse_pooling_request,
    read_inputs,
    read_ollama,
    read_texts,
)
from fastserve.openai.ollama import OllamaEmbeddingsRequest, OllamaEmbedRequest, untagged
from fastserve.worker import pooling_answers as answers
from fastserve.worker.adapters import ServedAdapters
from fastserve.worker.caller import Caller
from fastserve.worker.pooling_encoder import EncodedText, LongTexts, TextEncoder

_SAME_PROMPTS = (
    ("query", "search_query", "retrieval.query", "question"),
    ("document", "search_document", "passage", "retrieval.passage", "corpus"),
)
"""Names of prompts that say the same."""
_BYTES_PER_FLOAT = {"float": 22, "base64": 16 / 3}
"""Bytes of one number in an answer."""


@dataclass(frozen=True)
class PoolingJob:
    """One client request, validated and ready to run."""

    caller: Caller
    request: PoolingRequest
    num_tokens: int
    write: Callable[[PoolingResult], bytes]
    """The answer's body."""


@dataclass(frozen=True)
class PoolingLimits:
    max_tokens: int
    """Maximum tokens of all texts of a request together."""
    max_answer_bytes: int
    long_texts: LongTexts | None
    """None: OpenAI's routes refuse what is too long, and FastChat's splits it."""


class PoolingJobMaker:
    """Thread-safe: nothing is shared that changes."""

    def __init__(
        self,
        model_name: str,
        info: PoolingInfo,
        settings: PoolingOptions,
        encoder: TextEncoder,
        bounds: RequestBounds,
        limits: PoolingLimits,
        adapters: ServedAdapters,
    ) -> None:
        self._model_name = model_name
        self.info = info
        self._settings = settings
        self._encoder = encoder
        self._bounds = bounds
        self._limits = limits
        self._adapters = adapters

    def embed(self, body: bytes, caller: Caller, model: str | None = None) -> PoolingJob:
        """A job of /v1/embeddings. `model`: from the path, if it names one. Raises RequestError, as all methods
        here do."""
        request = parse_pooling_request(EmbeddingRequest, body, self._bounds, model=model)
        texts, num_prompt = self._encode_inputs(request)
        return self._vectors(request, caller, texts, "embed", num_prompt, answers.write_embeddings)

    def fastchat(self, body: bytes, caller: Caller) -> PoolingJob:
        """A job of /worker_get_embeddings."""
        request = parse_pooling_request(EmbeddingRequest, body, self._bounds, default_model=self._model_name)
        if request.encoding_format is None:
            request.encoding_format = "float"
        texts, num_prompt = self._encode_inputs(request, self._limits.long_texts or "chunk")
        return self._vectors(request, caller, texts, "embed", num_prompt, answers.write_fastchat)

    def ollama(self, body: bytes, caller: Caller) -> PoolingJob:
        """A job of /api/embed."""
        asked = read_ollama(OllamaEmbedRequest, body, self._bounds)
        limit = None if asked.truncate is False else -1
        fields = {"input": asked.input, "dimensions": asked.dimensions, "truncate_prompt_tokens": limit}
        request = self._embedding_request(asked.model, fields)
        texts, num_prompt = self._encode_inputs(request)
        return self._vectors(request, caller, texts, "embed", num_prompt, answers.write_ollama, asked.model)

    def ollama_embedding(self, body: bytes, caller: Caller) -> PoolingJob:
        """A job of /api/embeddings."""
        asked = read_ollama(OllamaEmbeddingsRequest, body, self._bounds)
        request = self._embedding_request(asked.model, {"input": asked.prompt, "truncate_prompt_tokens": -1})
        try:
            texts, num_prompt = self._encode_inputs(request)
        except InvalidRequestError as error:
            raise renamed(error, {"input": "prompt"}) from error
        return self._vectors(request, caller, texts, "embed", num_prompt, answers.write_ollama_embedding)

    def _embedding_request(self, model: str, fields: Mapping[str, Any]) -> EmbeddingRequest:
        known = model if self._adapters.resolve(model) is not None else untagged(model)
        return validate(EmbeddingRequest, {"model": known, **fields}, self._bounds)

    def pool(self, body: bytes, caller: Caller) -> PoolingJob:
        """A job of /v1/pooling."""
        request = parse_pooling_request(PoolRequest, body, self._bounds)
        task = request.task or self.info.kind
        allowed = ("classify",) if self.info.kind == "classify" else ("embed", "token_embed")
        if task not in allowed:
            raise UnsupportedParameterError(
                f"Invalid value for 'task': \"{task}\". This model can do {' and '.join(allowed)}.", param="task"
            )
        texts, num_prompt = self._encode_inputs(request, "refuse" if task == "token_embed" else None)
        if task == "classify":
            for name in ("dimensions", "normalize"):
                if getattr(request, name) is not None:
                    raise invalid(name, getattr(request, name), "Scores have none: leave it out.")
            write = answers.PoolingWriter(request.model, caller.request_id, request.encoding_format)
            return self._job(request, caller, texts, write, task="classify", activate=request.use_activation)
        return self._vectors(request, caller, texts, task, num_prompt, answers.write_pooling)

    def classify(self, body: bytes, caller: Caller) -> PoolingJob:
        request = parse_pooling_request(ClassifyRequest, body, self._bounds)
        special = request.add_special_tokens is not False
        texts = self._encode(read_inputs(request.input, self._bounds), "", request, None, add_special_tokens=special)
        write = answers.ClassifyWriter(request.model, caller.request_id, self.info.labels)
        return self._job(request, caller, texts, write, task="classify", activate=request.use_activation)

    def score(self, body: bytes, caller: Caller) -> PoolingJob:
        request = parse_pooling_request(ScoreRequest, body, self._bounds)
        (first, lefts), (second, rights) = request.sides(self._bounds)
        write = answers.ScoreWriter(request.model, caller.request_id)
        limits = [request.truncate_prompt_tokens] * 2
        return self._pairs(request, caller, (first, lefts, second, rights), write, request.use_activation, limits)

    def rerank(self, body: bytes, caller: Caller, *, is_cohere: bool) -> PoolingJob:
        request = parse_pooling_request(RerankRequest, body, self._bounds)
        if not request.query:
            raise invalid("query", "", "Give at least one character.")
        documents = read_texts(request.documents, "documents", self._bounds)
        if isinstance(request.documents, str):
            raise invalid("documents", request.documents, "Give an array of strings or of objects with 'text'.")
        returned = (
            documents if request.return_documents or (request.return_documents is None and not is_cohere) else None
        )
        kind = answers.CohereRerankWriter if is_cohere else answers.RerankWriter
        write = kind(request.model, caller.request_id, request.top_n, returned)
        limits = [request.truncate_prompt_tokens, request.max_tokens_per_doc or request.truncate_prompt_tokens]
        texts = ("query", [request.query], "documents", documents)
        return self._pairs(request, caller, texts, write, request.use_activation, limits)

    def _vectors(
        self,
        request: EmbeddingFields,
        caller: Caller,
        texts: Sequence[EncodedText],
        task: PoolingTask,
        num_prompt_tokens: int,
        make_writer: Callable[[str, str, str], answers.PoolingWriterType],
        shown_model: str | None = None,
    ) -> PoolingJob:
        """`shown_model`: the model's name in the answer; None: as in the request."""
        if request.dimensions is not None and request.dimensions > self.info.width:
            raise invalid("dimensions", request.dimensions, f"This model's vectors have {self.info.width} numbers.")
        form = request.encoding_format or "float"
        num_rows = sum(map(_num_tokens, texts)) if task == "token_embed" else len(texts)
        num_bytes = int(num_rows * (request.dimensions or self.info.width) * _BYTES_PER_FLOAT[form])
        if num_bytes > self._limits.max_answer_bytes:
            allowed = self._limits.max_answer_bytes
            raise InvalidRequestError(
                f"The answer to 'input' would have about {num_bytes} bytes, and {allowed} are allowed "
                "(--max-pooling-answer-bytes). Send fewer texts in one request, or ask for base64 or fewer dimensions.",
                param="input",
            )
        return self._job(
            request,
            caller,
            texts,
            make_writer(shown_model or request.model, caller.request_id, form),
            task=task,
            dimensions=request.dimensions,
            normalize=request.normalize,
            num_prompt_tokens=num_prompt_tokens,
        )

    def _pairs(
        self,
        request: PoolingFields,
        caller: Caller,
        texts: tuple[str, list[str], str, list[str]],
        write: answers.PoolingWriterType,
        activate: bool | None,
        limits: Sequence[int | None],
    ) -> PoolingJob:
        """Scores of pairs: a cross-encoder's, or the similarity of vectors. `texts`: names and texts of both sides.
        `limits`: tokens that texts of each side are cut to; of a pair, the last one given counts."""
        first, lefts, second, rights = texts
        many = [lefts[0]] * len(rights) if len(lefts) == 1 else lefts
        if self.info.kind == "classify":
            limit = next((self._limit(limit) for limit in reversed(limits) if limit is not None), None)
            encoded = [
                self._encoder.encode_pair(left, right, second, limit=limit, long_texts=self._long_texts)
                for left, right in zip(many, rights, strict=True)
            ]
            return self._job(request, caller, encoded, write, task="classify", activate=activate)
        if activate is not None:
            raise invalid("use_activation", activate, "The scores of this model are similarities: leave it out.")
        query, document = self._pair_prompts()
        sides = [
            self._encode(list(side), prompt, request, limit, name=name)
            for side, prompt, limit, name in ((lefts, query, limits[0], first), (rights, document, limits[1], second))
        ]
        pairs = [(0 if len(lefts) == 1 else index, len(lefts) + index) for index in range(len(rights))]
        return self._job(request, caller, [*sides[0], *sides[1]], write, task="similarity", pairs=pairs)

    def _job(
        self,
        request: PoolingFields,
        caller: Caller,
        texts: Sequence[EncodedText],
        write: answers.PoolingWriterType,
        **fields: Any,
    ) -> PoolingJob:
        model = self._adapters.resolve(request.model)
        if model is None:
            raise self._adapters.unknown(request.model)
        priority = request.priority or 0
        if priority < 0 and not caller.may_prioritise:
            raise PermissionDeniedError(
                f"Your key may not set a priority below 0 (given: {priority}). Leave it out, or ask whoever runs this "
                "server for a key with that right.",
                param="priority",
            )
        ids = array.array("i")
        lengths, first_lengths, counts = [], [], []
        for text in texts:
            counts.append(len(text.pieces))
            for piece in text.pieces:
                ids.extend(piece)
                lengths.append(len(piece))
                if text.first_length is not None:
                    first_lengths.append(text.first_length)
            if len(ids) > self._limits.max_tokens:
                raise InvalidRequestError(
                    f"The texts have more than {self._limits.max_tokens} tokens (--max-pooling-tokens). Send fewer or "
                    "shorter ones in one request."
                )
        if sys.byteorder == "big":
            ids.byteswap()
        pooling = PoolingRequest(
            caller.request_id,
            ids.tobytes(),
            lengths,
            first_lengths=first_lengths,
            piece_counts=counts if len(lengths) > len(counts) else [],
            priority=priority,
            **fields,
        )
        num_tokens = len(ids)
        return PoolingJob(caller, pooling, num_tokens, lambda result: write(result, num_tokens))

    def _encode_inputs(
        self, request: EmbeddingFields, long_texts: LongTexts | None = None
    ) -> tuple[list[EncodedText], int]:
        """The texts of `input`, and the number of tokens of the prompt before each."""
        prompt = self._prompt(request)
        inputs = read_inputs(request.input, self._bounds)
        special = request.add_special_tokens is not False
        texts = self._encode(inputs, prompt, request, None, add_special_tokens=special, long_texts=long_texts)
        if not prompt or self._settings.pools_prompt or not isinstance(inputs[0], str):
            return texts, 0
        return texts, self._encoder.prompt_length(prompt)

    def _encode(
        self,
        inputs: Sequence[str | list[int]],
        prompt: str,
        request: PoolingFields,
        limit: int | None,
        *,
        name: str = "input",
        add_special_tokens: bool = True,
        long_texts: LongTexts | None = None,
    ) -> list[EncodedText]:
        """`limit`: in place of the request's own."""
        limit = self._limit(request.truncate_prompt_tokens if limit is None else limit)
        policy = long_texts or self._long_texts
        encoded, num_tokens = [], 0
        for index, text in enumerate(inputs):
            where = f"{name}.{index}" if len(inputs) > 1 else name
            if isinstance(text, str):
                one = self._encoder.encode(
                    prompt + text, where, limit=limit, long_texts=policy, add_special_tokens=add_special_tokens
                )
            else:
                one = self._encoder.check_ids(text, where, limit=limit, long_texts=policy)
            num_tokens += _num_tokens(one)
            if num_tokens > self._limits.max_tokens:
                raise InvalidRequestError(
                    f"The texts of '{name}' have more than {self._limits.max_tokens} tokens (--max-pooling-tokens). "
                    "Send fewer or shorter ones in one request.",
                    param=name,
                )
            encoded.append(one)
        return encoded

    @property
    def _long_texts(self) -> LongTexts:
        return self._limits.long_texts or "refuse"

    def _limit(self, limit: int | None) -> int | None:
        return self._encoder.max_length if limit == -1 else limit

    def _prompt(self, request: EmbeddingFields) -> str:
        """The text to put before each text."""
        prompts = self._settings.prompts
        name, field = request.prompt_name, "prompt_name"
        if name is None and request.input_type is not None:
            if not prompts:
                return ""
            name, field = _same_name(request.input_type, prompts) or request.input_type, "input_type"
        if name is None:
            return prompts.get(self._settings.default_prompt or "", "")
        if name not in prompts:
            known = printable(", ".join(prompts), 500) or "none"
            raise invalid(field, name, f"This model has these prompts: {known}.")
        return prompts[name]

    def _pair_prompts(self) -> tuple[str, str]:
        """The texts before a query and before a document."""
        prompts = self._settings.prompts
        usual = prompts.get(self._settings.default_prompt or "", "")
        query, document = (_same_name(names[0], prompts) for names in _SAME_PROMPTS)
        return usual if query is None else prompts[query], usual if document is None else prompts[document]


def _same_name(name: str, prompts: Mapping[str, str]) -> str | None:
    """The name of the model's prompt for `name`, which may be another word for it."""
    if name in prompts:
        return name
    names = next((names for names in _SAME_PROMPTS if name in names), ())
    return next((other for other in names if other in prompts), None)


def _num_tokens(text: EncodedText) -> int:
    return sum(map(len, text.pieces))
