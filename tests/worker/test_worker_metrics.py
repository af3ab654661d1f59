"""The engine's metrics: vLLM's names, and histograms in Prometheus's format."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from fastserve.engine.contract import (
    STEP_SECONDS_BOUNDS,
    STEP_SIZE_BOUNDS,
    AdapterStats,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FusedLayers,
    Histogram,
)
from fastserve.worker.admission import Admission
from fastserve.worker.metrics import WorkerMetrics
from tests.worker.conftest import MODEL, Running, RunWorker


def read(stats: EngineStats) -> dict[str, float]:
    metrics = WorkerMetrics()
    metrics.watch(Admission(4, 4, 10**6, lambda: 0.0), lambda: 0, lambda: stats)
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = "".join(f"|{value}" for value in sample.labels.values())
            found[sample.name + labels] = sample.value
    return found


def test_the_engines_statistics_have_the_usual_names() -> None:
    stats = EngineStats(
        num_running=3, num_waiting=2, num_blocks=40, num_used_blocks=10, prompt_tokens=100, cached_tokens=64,
        generated_tokens=50, preemptions=4, draft_tokens=9, accepted_tokens=7,
    )  # fmt: skip
    found = read(stats)
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25, "prompt_tokens_total": 100,
        "prefix_cache_queries_total": 100, "prefix_cache_hits_total": 64, "generation_tokens_total": 50,
        "num_preemptions_total": 4, "spec_decode_num_draft_tokens_total": 9, "spec_decode_num_accepted_tokens_total": 7,
    }  # fmt: skip
    assert {name: found[f"fastserve_engine_{name}"] for name in expected} == expected


def test_adapters_are_counted_where_they_are_served() -> None:
    assert not [name for name in read(EngineStats()) if "lora" in name]
    found = read(
        EngineStats(adapters=AdapterStats(9, num_on_device=3, num_on_host=5, num_running=2, loads=7, evictions=4))
    )
    counted = {name.removeprefix("fastserve_engine_"): value for name, value in found.items() if "lora" in name}
    assert counted == {
        "num_loras": 9, "num_loras_on_device": 3, "num_loras_on_host": 5, "num_loras_running": 2,
        "lora_loads_total": 7, "lora_evictions_total": 4,
    }  # fmt: skip


async def test_adapters_of_requests_are_labels_as_in_vllm(run_worker: RunWorker) -> None:
    name = "fastserve_engine_lora_requests_info"
    words = ("fastserve-demo-words", "fastserve-demo-capitals")

    async def labels(running: Running) -> dict[str, str]:
        async with running.http.get(running.url + "/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        (sample,) = [sample for family in families for sample in family.samples if sample.name == name]
        assert abs(sample.value - time.time()) < 60
        return dict(sample.labels)

    def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        return [300] * 400

    flags: dict[str, Any] = {"lora_dirs": words, "limit_worker_concurrency": 2, "max_loras": 7}
    async with run_worker(script, token_s=0.01, **flags) as running:
        none = {"max_lora": "7", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert await labels(running) == none
        body = {"prompt": "Hi", "max_tokens": 300, "stream": True}
        async with AsyncExitStack() as stack:
            for model in (MODEL, *words):
                post = running.http.post(running.url + "/v1/completions", json=body | {"model": model})
                response = await stack.enter_async_context(post)
                if model != words[1]:
                    await response.content.readline()
            expected = {"running_lora_adapters": words[0], "waiting_lora_adapters": words[1]}
            assert await labels(running) == none | expected
        await running.idle()
        assert await labels(running) == none
    async with run_worker() as running, running.http.get(running.url + "/metrics") as response:
        assert name not in await response.text()


def test_layers_without_a_fused_kernel_are_counted() -> None:
    metrics = WorkerMetrics()
    metrics.show_fused_layers([FusedLayers("norm", 7, 7), FusedLayers("attention", 2, 3, "LlamaAttention clips")])
    text = metrics.exposition().decode()
    for kind, fused, count in (
        ("norm", "true", 7),
        ("norm", "false", 0),
        ("attention", "true", 2),
        ("attention", "false", 1),
    ):
        assert f'fastserve_engine_layers{{fused="{fused}",kind="{kind}"}} {count}.0' in text


def test_histograms_of_steps() -> None:
    stats = EngineStats()
    for seconds, tokens, sequences in ((0.004, 300, 5), (0.005, 1, 1), (99.0, 100_000, 5)):
        stats.step_seconds.add(seconds, STEP_SECONDS_BOUNDS)
        stats.step_tokens.add(tokens, STEP_SIZE_BOUNDS)
        stats.step_sequences.add(sequences, STEP_SIZE_BOUNDS)
    found = read(stats)
    name = "fastserve_engine_step_duration_seconds"
    assert found[f"{name}_count"] == 3
    assert found[f"{name}_sum"] == 99.009
    assert [found[f"{name}_bucket|{bound}"] for bound in ("0.0025", "0.005", "10.0", "+Inf")] == [0, 2, 2, 3]
    assert found["fastserve_engine_iteration_tokens_total_bucket|1.0"] == 1
    assert found["fastserve_engine_iteration_tokens_total_bucket|512.0"] == 2
    assert found["fastserve_engine_iteration_tokens_total_sum"] == 100_301
    assert found["fastserve_engine_step_sequences_bucket|8.0"] == 3


def test_an_engine_that_has_done_nothing_has_empty_histograms() -> None:
    found = read(EngineStats())
    assert found["fastserve_engine_step_sequences_bucket|+Inf"] == 0
    assert found["fastserve_engine_kv_cache_usage_perc"] == 0
    assert Histogram() == EngineStats().step_tokens
