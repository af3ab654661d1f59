"""Vectors and scores over HTTP: the worker on a fake engine, through the API server, and with OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from fastserve.config import ApiServerConfig, ControllerConfig
from fastserve.control.app import create_app as create_controller
from fastserve.engine.contract import PoolingInfo
from fastserve.engine.fake import FakeOptions
from fastserve.gateway.app import create_app as create_api_server
from fastserve.openai.routes import POOLING_ROUTES
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.app import HANDLERS
from fastserve.worker.pooling_encoder import shares
from tests.apps import serve_app
from tests.worker.conftest import MODEL, Running, RunWorker, until

EMBEDDER = PoolingInfo("embed", 8, is_normalized=True)
RANKER = PoolingInfo("classify", 1, ("relevant",))
CLASSIFIER = PoolingInfo("classify", 3, ("bad", "fair", "good"))
LENGTH = 64


@asynccontextmanager
async def pooling_worker(run_worker: RunWorker, info: PoolingInfo, **settings: Any) -> AsyncIterator[Running]:
    def prepare(options: FakeOptions) -> None:
        options.pooling = info

    settings.setdefault("task", info.kind)
    async with run_worker(prepare=prepare, max_model_len=LENGTH, handlers=HANDLERS, **settings) as running:
        yield running


@asynccontextmanager
async def cluster(run_worker: RunWorker, info: PoolingInfo) -> AsyncIterator[tuple[str, Running]]:
    """A controller, a worker and an API server; yields the address of the API server."""
    async with serve_app(create_controller(ControllerConfig(insecure=True))) as controller:
        common: dict[str, Any] = {"controller_address": controller, "insecure": True}
        async with (
            pooling_worker(run_worker, info, no_register=False, heartbeat_interval_s=0.05, **common) as worker,
            serve_app(create_api_server(ApiServerConfig(host="127.0.0.1", **common))) as url,
        ):
            async with asyncio.timeout(10):
                while True:
                    async with worker.http.get(f"{url}/v1/models/{MODEL}") as response:
                        if response.status == 200:
                            break
                    await asyncio.sleep(0.02)
            yield url, worker


def numbers(data: str) -> tuple[float, ...]:
    raw = base64.b64decode(data, validate=True)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


async def test_openai_clients_get_vectors_by_the_api_server(run_worker: RunWorker) -> None:
    async with cluster(run_worker, EMBEDDER) as (url, worker):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        answer = await client.embeddings.create(model=MODEL, input=["one two", "three"])
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(worker.engine.pooling_requests[0].lengths)
        for item in answer.data:
            assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-5)
        same = await client.embeddings.create(model=MODEL, input="three", encoding_format="float")
        assert same.data[0].embedding == pytest.approx(answer.data[1].embedding)
        short = await client.embeddings.create(model=MODEL, input="three", dimensions=3)
        assert len(short.data[0].embedding) == 3
        sync = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        blocking = await asyncio.to_thread(sync.embeddings.create, model=MODEL, input="three")
        assert blocking.data[0].embedding == pytest.approx(answer.data[1].embedding)
        await client.close()
        sync.close()


async def test_every_route_passes_the_api_server(run_worker: RunWorker) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "embeddings": {"input": "a b"},
        "rerank": {"query": "a", "documents": ["b", "a"]},
        "score": {"text_1": "a", "text_2": ["b", "a"]},
        "pooling": {"input": "a b"},
        "classify": {"input": "a b"},
    }
    async with cluster(run_worker, EMBEDDER) as (url, worker):
        assert set(worker.runtime.status().capabilities or ()) == {"embeddings", "rerank", "score", "pooling"}
        for route in POOLING_ROUTES:
            path = route.path.replace("{model:path}", MODEL)
            async with worker.http.post(url + path, json={"model": MODEL, **bodies[route.capability]}) as response:
                answer = await response.json()
                if route.capability == "classify":
                    assert (response.status, answer["error"]["code"]) == (400, "unsupported_capability")
                    assert "embeddings (/v1/embeddings)" in answer["error"]["message"]
                else:
                    assert response.status == 200
                    assert answer[route.contents]
        async with worker.http.post(f"{url}/v1/engines/nobody%2Fhere/embeddings", json={"input": "a"}) as response:
            assert response.status == 404
        async with worker.http.get(url + "/openapi.json") as response:
            paths = (await response.json())["paths"]
            assert "/v1/engines/{model}/embeddings" in paths
            operations = [described["operationId"] for path in paths.values() for described in path.values()]
            assert len(operations) == len(set(operations))


@pytest.mark.parametrize("base", ["api server", "worker"])
async def test_a_model_of_another_kind_is_a_400_that_lists_what_it_can(run_worker: RunWorker, base: str) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with cluster(run_worker, CLASSIFIER) as (url, worker):
        address = url if base == "api server" else worker.url
        for path, body in (("/v1/chat/completions", chat), ("/v1/embeddings", {"model": MODEL, "input": "a"})):
            async with worker.http.post(address + path, json=body) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"], error["param"]) == (400, "unsupported_capability", "model")
                assert "classify (/v1/classify)" in error["message"]
    async with run_worker(handlers=HANDLERS) as running:
        status, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": "a"})
        assert (status, answer["error"]["code"]) == (400, "unsupported_capability")
        assert "chat (/v1/chat/completions)" in answer["error"]["message"]


async def test_inputs_may_be_texts_or_token_ids(run_worker: RunWorker, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in ("one two", "three")]
    async with pooling_worker(run_worker, EMBEDDER) as running:
        vectors = []
        for given in (["one two", "three"], ids):
            _, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": given})
            vectors.append([item["embedding"] for item in answer["data"]])
        _, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": ids[0]})
        assert vectors[0] == vectors[1] == [answer["data"][0]["embedding"], vectors[0][1]]
        _, packed = await running.post(
            "/v1/embeddings", {"model": MODEL, "input": ["one two"], "encoding_format": "base64"}
        )
        assert list(numbers(packed["data"][0]["embedding"])) == vectors[0][0]
        many = await running.post("/v1/embeddings", {"model": MODEL, "input": ["x"] * 2048, "dimensions": 1})
        assert [item["index"] for item in many[1]["data"]] == list(range(2048))


async def test_texts_that_are_too_long(run_worker: RunWorker) -> None:
    text = "word " * 300
    async with pooling_worker(run_worker, EMBEDDER) as running:
        requests = running.engine.pooling_requests
        status, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": ["a", text]})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == "input.1"
        assert "truncate_prompt_tokens" in answer["error"]["message"]
        for wanted, length in ((-1, LENGTH), (5, 5)):
            body = {"model": MODEL, "input": text, "truncate_prompt_tokens": wanted}
            assert (await running.post("/v1/embeddings", body))[1]["usage"]["prompt_tokens"] == length
        _, record = await running.post("/worker_get_embeddings", {"input": [text, "a"], "model": MODEL})
        assert record["token_num"] == sum(requests[-1].lengths) > 300
        assert requests[-1].piece_counts == [len(requests[-1].lengths) - 1, 1]
        assert len(record["embedding"]) == 2
    async with pooling_worker(run_worker, EMBEDDER, embed_in_truncate=True) as running:
        _, record = await running.post("/worker_get_embeddings", {"input": [text], "model": MODEL})
        assert record["token_num"] == LENGTH
    async with pooling_worker(run_worker, EMBEDDER, embedding_long_inputs="chunk") as running:
        status, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": text})
        assert status == 200
        assert len(answer["data"]) == 1
        assert max(running.engine.pooling_requests[0].lengths) == LENGTH


async def test_fastchat_gets_base64_and_error_records(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        _, plain = await running.post("/worker_get_embeddings", {"input": ["a"], "model": MODEL})
        _, packed = await running.post("/worker_get_embeddings", {"input": ["a"], "encoding_format": "base64"})
        assert list(numbers(packed["embedding"][0])) == plain["embedding"][0]
        status, record = await running.post("/worker_get_embeddings", {"input": []})
        assert (status, record["error_code"]) == (200, 40302)
        assert "input" in record["text"]


DOCUMENTS = ["123", {"text": "cats eat"}, "456"]


@pytest.mark.parametrize("info", [EMBEDDER, RANKER], ids=["embedder", "cross-encoder"])
async def test_documents_are_sorted_by_relevance(run_worker: RunWorker, info: PoolingInfo) -> None:
    body = {"model": MODEL, "query": "cats eat", "documents": DOCUMENTS}
    async with pooling_worker(run_worker, info) as running:
        _, jina = await running.post("/v1/rerank", body)
        scores = [result["relevance_score"] for result in jina["results"]]
        assert scores == sorted(scores, reverse=True)
        assert jina["results"][0]["index"] == 1
        assert jina["results"][0]["document"] == {"text": "cats eat"}
        assert {result["index"] for result in jina["results"]} == {0, 1, 2}
        assert jina["usage"]["total_tokens"] == sum(running.engine.pooling_requests[0].lengths)
        _, best = await running.post("/rerank", {**body, "top_n": 1, "return_documents": False})
        assert best["results"] == [{"index": 1, "relevance_score": scores[0]}]
        _, cohere = await running.post("/v2/rerank", body)
        assert [result["relevance_score"] for result in cohere["results"]] == scores
        assert cohere["meta"]["billed_units"] == {"search_units": 1}
        assert "document" not in cohere["results"][0]
        _, score = await running.post("/v1/score", {"model": MODEL, "queries": "cats eat", "documents": ["cats eat"]})
        assert score["data"][0]["score"] == pytest.approx(scores[0])
        pairs = {"model": MODEL, "text_1": ["a", "b"], "text_2": ["a", "c"]}
        _, each = await running.post("/score", pairs)
        assert each["data"][0]["score"] > each["data"][1]["score"]


async def test_labels_and_logits(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, CLASSIFIER) as running:
        assert running.runtime.status().capabilities == ["classify", "pooling"]
        _, answer = await running.post("/v1/classify", {"model": MODEL, "input": ["a a a a", "c"]})
        (first, second) = answer["data"]
        assert (first["index"], second["index"], first["num_classes"], first["label"]) == (0, 1, 3, "good")
        assert sum(first["probs"]) == pytest.approx(1, abs=1e-6)
        _, logits = await running.post("/classify", {"model": MODEL, "input": "a a a a", "use_activation": False})
        low, middle, high = logits["data"][0]["probs"]
        assert (low, high) == (0, pytest.approx(2 * middle))
        assert middle > 0
        _, pooled = await running.post("/pooling", {"model": MODEL, "input": "a a a a"})
        assert pooled["data"][0]["data"] == first["probs"]


async def test_vectors_of_tokens(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        body = {"model": MODEL, "input": ["a b c", "d"], "task": "token_embed", "dimensions": 2}
        _, answer = await running.post("/v1/pooling", body)
        assert [len(item["data"]) for item in answer["data"]] == running.engine.pooling_requests[0].lengths
        assert all(len(row) == 2 for item in answer["data"] for row in item["data"])


ODD: Sequence[Any] = [
    None,
    True,
    5,
    -1,
    1.5,
    "x",
    "",
    [],
    {},
    [None],
    [[]],
    [{}],
    ["a", 1],
    {"a": {}},
    10**40,
    "\ud800",
]
FIELDS = {
    "/v1/embeddings": [
        *("model", "input", "encoding_format", "dimensions", "normalize", "add_special_tokens", "prompt_name"),
        *("input_type", "truncate_prompt_tokens", "priority", "user", "messages", "no_such_field"),
    ],
    "/v1/rerank": [
        *("model", "query", "documents", "top_n", "return_documents", "max_tokens_per_doc", "truncate_prompt_tokens"),
        *("use_activation", "rank_fields"),
    ],
    "/v1/score": ["text_1", "text_2", "queries", "documents", "items", "data_1", "data_2", "use_activation"],
    "/v1/pooling": ["input", "task", "use_activation", "dimensions"],
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/v1/pooling": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
}


@pytest.mark.parametrize("path", FIELDS)
async def test_odd_values_of_every_field_are_refused_by_name_or_served(run_worker: RunWorker, path: str) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        for field in FIELDS[path]:
            for value in ODD:
                body = json.dumps({"model": MODEL, **GOOD[path], field: value}).encode()
                headers = {"content-type": "application/json"}
                async with running.http.post(running.url + path, data=body, headers=headers) as response:
                    answer = await response.json()
                    assert response.status in (200, 400, 403, 404), (field, value, answer)
                    if response.status != 200:
                        error = answer["error"]
                        assert error["message"]
                        named = str(error["param"]).partition(".")[0]
                        assert named in (field, "None") or field in error["message"], (field, value, error)
        status, _ = await running.post(path, {"model": MODEL, **GOOD[path]})
        assert status == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"dimensions": 9}, "dimensions", "have 8 numbers"),
        ({"input": [[1, 2], [3, 10**6]]}, "input.1", "Token ids"),
        ({"prompt_name": "query"}, "prompt_name", "prompts: none"),
        ({"input_type": "query", "prompt_name": "query"}, "input_type", "give one of them"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 for what the model takes"),
        ({"embed_dtype": "float16"}, "embed_dtype", "not supported"),
        ({"input": ["a"] * 2049}, "input", "--max-prompts"),
    ],
)
async def test_refusals_name_field_value_and_remedy(
    run_worker: RunWorker, fields: dict[str, Any], param: str, words: str
) -> None:
    async with pooling_worker(run_worker, EMBEDDER) as running:
        status, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": "a", **fields})
        assert (status, answer["error"]["param"]) == (400, param)
        assert words in answer["error"]["message"]
        assert not running.engine.pooling_requests


async def test_the_tokens_and_the_answer_of_a_request_are_bounded(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER, max_pooling_tokens=50, max_pooling_answer_bytes=1000) as running:
        for given, flag in ((["word " * 28], "--max-pooling-tokens"), (["a"] * 6, "--max-pooling-answer-bytes")):
            status, answer = await running.post("/v1/embeddings", {"model": MODEL, "input": given})
            assert status == 400
            assert flag in answer["error"]["message"]
        status, _ = await running.post(
            "/v1/embeddings", {"model": MODEL, "input": ["a"] * 6, "encoding_format": "base64"}
        )
        assert status == 200


async def test_texts_beyond_the_bound_of_all_requests_are_a_429(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER, token_s=0.3, max_queued_tokens=40) as running:
        body = {"model": MODEL, "input": ["word"] * 15}
        answers = await asyncio.gather(*(running.post("/v1/embeddings", body) for _ in range(4)))
        statuses = sorted(status for status, _ in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        refused = next(answer for status, answer in answers if status == 429)
        assert "--max-queued-tokens" in refused["error"]["message"]
        assert (await running.post("/v1/embeddings", body))[0] == 200


async def test_a_client_that_leaves_aborts_its_request(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER, token_s=30) as running:
        task = asyncio.create_task(running.post("/v1/embeddings", {"model": MODEL, "input": "a"}))
        await until(lambda: running.engine.pooling_requests)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: running.engine.stats.aborted == 1)
        await running.idle()


async def test_requests_fail_when_the_engine_dies_and_are_served_when_it_is_back(run_worker: RunWorker) -> None:
    async with pooling_worker(run_worker, EMBEDDER, token_s=0.2) as running:
        body = {"model": MODEL, "input": "a"}
        asked = [asyncio.create_task(running.post("/v1/embeddings", body)) for _ in range(3)]
        await until(lambda: len(running.engine.pooling_requests) == 3)
        running.engine.die()
        assert {status for status, _ in await asyncio.gather(*asked)} == {503}
        await until(lambda: running.runtime.keeper.ready)
        assert (await running.post("/v1/embeddings", body))[0] == 200


@pytest.mark.parametrize("first", range(0, 12, 3))
@pytest.mark.parametrize("second", range(0, 12, 4))
def test_the_shorter_text_of_a_pair_stays_whole_while_it_can(first: int, second: int) -> None:
    room = 8
    kept = shares(first, second, room)
    if first + second > room:
        assert sum(kept) == room
        assert min(kept) >= min(first, second, room // 2)
        assert kept[0] <= first
        assert kept[1] <= second
