"""Answers with vectors and scores: OpenAI's embeddings, Jina's and Cohere's rerank, vLLM's score, classify and pooling,
FastChat's embeddings."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastserve.engine.contract import PoolingResult
from fastserve.openai.answers import encode_json

PoolingWriterType = Callable[[PoolingResult, int], bytes]
"""(result, number of tokens) -> body of the answer"""
_BYTES = 4
"""Bytes of a number as float32."""


def rows(result: PoolingResult) -> Iterator[bytes]:
    """The bytes of each row."""
    size = _BYTES * result.width
    return (result.values[at : at + size] for at in range(0, len(result.values), size))


def floats(row: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(row) // _BYTES}f", row)


def _encoded(row: bytes, form: str | None) -> bytes:
    """A row as JSON: an array, or a string of base64."""
    # Row by row: encoding holds the GIL.
    return b'"' + base64.b64encode(row) + b'"' if form == "base64" else encode_json(floats(row))


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _listed(head: dict[str, Any], items: Iterator[bytes], tail: dict[str, Any], name: str = "data") -> bytes:
    """An object with the fields of `head`, a list of items in JSON, and the fields of `tail`."""
    return b'%b,"%b":[%b],%b' % (encode_json(head)[:-1], name.encode(), b",".join(items), encode_json(tail)[1:])


def write_embeddings(model: str, request_id: str, form: str) -> PoolingWriterType:
    def write(result: PoolingResult, num_tokens: int) -> bytes:
        items = (
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, _encoded(row, form))
            for index, row in enumerate(rows(result))
        )
        return _listed({"object": "list"}, items, {"model": model, "usage": _usage(num_tokens)})

    return write


def write_fastchat(model: str, request_id: str, form: str) -> PoolingWriterType:
    def write(result: PoolingResult, num_tokens: int) -> bytes:
        items = (_encoded(row, form) for row in rows(result))
        return b'{"embedding":[%b],"token_num":%d}' % (b",".join(items), num_tokens)

    return write


def write_ollama(model: str, request_id: str, form: str) -> PoolingWriterType:
    started = time.monotonic_ns()

    def write(result: PoolingResult, num_tokens: int) -> bytes:
        tail = {
            "total_duration": time.monotonic_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": num_tokens,
        }
        return _listed({"model": model}, (_encoded(row, form) for row in rows(result)), tail, "embeddings")

    return write


def write_ollama_embedding(model: str, request_id: str, form: str) -> PoolingWriterType:
    def write(result: PoolingResult, num_tokens: int) -> bytes:
        return b'{"embedding":%b}' % next(_encoded(row, form) for row in rows(result))

    return write


def write_pooling(model: str, request_id: str, form: str) -> PoolingWriterType:
    return PoolingWriter(model, request_id, form)


class PoolingWriter:
    def __init__(self, model: str, request_id: str, form: str | None) -> None:
        self._form = form
        self._head = _head("pool", request_id, model)

    def __call__(self, result: PoolingResult, num_tokens: int) -> bytes:
        items = (
            b'{"index":%d,"object":"pooling","data":%b}' % (index, data)
            for index, data in enumerate(self._data(result))
        )
        return _listed(self._head, items, {"usage": _usage(num_tokens)})

    def _data(self, result: PoolingResult) -> Iterator[bytes]:
        all_rows = rows(result)
        if not result.row_counts:
            yield from (_encoded(row, self._form) for row in all_rows)
        for count in result.row_counts:
            yield b"[" + b",".join(_encoded(next(all_rows), self._form) for _ in range(count)) + b"]"


class ClassifyWriter:
    def __init__(self, model: str, request_id: str, labels: Sequence[str]) -> None:
        self._labels = labels
        self._head = _head("classify", request_id, model)

    def __call__(self, result: PoolingResult, num_tokens: int) -> bytes:
        return _listed(self._head, map(encode_json, self._items(result)), {"usage": _usage(num_tokens)})

    def _items(self, result: PoolingResult) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows(result)):
            scores = floats(row)
            label = self._labels[max(range(len(scores)), key=scores.__getitem__)]
            yield {"index": index, "label": label, "probs": scores, "num_classes": len(scores)}


class ScoreWriter:
    def __init__(self, model: str, request_id: str) -> None:
        self._head = _head("score", request_id, model)

    def __call__(self, result: PoolingResult, num_tokens: int) -> bytes:
        items = (
            encode_json({"index": index, "object": "score", "score": score})
            for index, score in enumerate(floats(result.values))
        )
        return _listed(self._head, items, {"usage": _usage(num_tokens)})


class RerankWriter:
    """Jina's form."""

    def __init__(self, model: str, request_id: str, top_n: int | None, documents: Sequence[str] | None) -> None:
        """`documents`: None if the answer does not repeat them."""
        self._model = model
        self._id = request_id
        self._top_n = top_n
        self._documents = documents

    def __call__(self, result: PoolingResult, num_tokens: int) -> bytes:
        head = {"id": f"rerank-{self._id}", "model": self._model, "usage": _usage(num_tokens)}
        return encode_json({**head, "results": self._results(result)})

    def _results(self, result: PoolingResult) -> list[dict[str, Any]]:
        scores = floats(result.values)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._top_n]
        return [
            {"index": index}
            | ({} if self._documents is None else {"document": {"text": self._documents[index]}})
            | {"relevance_score": scores[index]}
            for index in order
        ]


class CohereRerankWriter(RerankWriter):
    def __call__(self, result: PoolingResult, num_tokens: int) -> bytes:
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        return encode_json({"id": f"rerank-{self._id}", "results": self._results(result), "meta": meta})


def _head(kind: str, request_id: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{request_id}", "object": "list", "created": int(time.time()), "model": model}
