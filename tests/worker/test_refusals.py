from __future__ import annotations

from typing import Any

import pytest

from fastserve.config import WorkerConfig
from fastserve.errors import StartupError
from fastserve.worker.refusals import refuse_unavailable


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "npu"}, "--device npu"),
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"tp_size": 2, "num_gpus": 2}, "--tp-size excludes --num-gpus"),
        ({"tp_size": 2, "cpu_offloading": True}, "--tp-size excludes --num-gpus"),
        ({"machine_collectives": "host", "tp_size": 2}, "--machine-collectives host says"),
        ({"enable_expert_parallel": True}, "give --tp-size of at least 2 too"),
        ({"tp_size": 3, "gpus": "0,1"}, "Larger --tp-size (3) than --gpus 0,1"),
        ({"num_gpus": 2, "device": "cpu"}, "--num-gpus 2"),
        ({"num_gpus": 2, "device": "mps"}, "--num-gpus 2"),
        ({"num_gpus": 2, "device": "xpu"}, "one worker for each GPU"),
        ({"max_gpu_memory": "20"}, "--max-gpu-memory 20 is not"),
        ({"gpus": "0;2"}, "--gpus 0;2"),
        ({"load_8bit": True, "load_4bit": True}, "--load-8bit and --load-4bit exclude each other"),
        ({"load_8bit": True, "gptq_wbits": 4}, "leave them out with a GPTQ or AWQ checkpoint"),
        ({"load_4bit": True, "awq_ckpt": "x"}, "leave them out with a GPTQ or AWQ checkpoint"),
        ({"awq_wbits": 4, "gptq_ckpt": "x"}, "The gptq and awq flags exclude each other"),
        ({"dummy": True, "gptq_wbits": 4}, "--dummy reads no weights"),
        ({"cpu_offloading": True, "device": "cpu"}, "--cpu-offloading"),
        ({"gptq_act_order": True}, "give --gptq-wbits or --gptq-ckpt too"),
        ({"gptq_wbits": 4, "gptq_groupsize": 0}, "--gptq-groupsize 0"),
        ({"awq_wbits": 4, "awq_groupsize": -2}, "--awq-groupsize -2"),
        ({"enable_exllama": True}, "--enable-exllama"),
        ({"exllama_cache_8bit": True}, "ExLlamaV2"),
        ({"exllama_gpu_split": "20"}, "ExLlamaV2"),
        ({"enable_xft": True}, "--enable-xft"),
        ({"xft_dtype": "bf16"}, "xFasterTransformer"),
        ({"embed_in_truncate": True, "embedding_long_inputs": "chunk"}, "--embed-in-truncate"),
        ({"conv_template": "chatml", "chat_template": "x"}, "--conv-template"),
        ({"limit_worker_concurrency": 0}, "--limit-worker-concurrency 0"),
        ({"stream_interval": 0}, "--stream-interval 0"),
        ({"heartbeat_interval_s": 0.0}, "--heartbeat-interval-s 0.0"),
        ({"gptq_groupsize": 128}, "give --gptq-wbits or --gptq-ckpt too"),
        ({"awq_groupsize": 128}, "give --awq-wbits or --awq-ckpt too"),
        ({"exllama_max_seq_len": 2048}, "ExLlamaV2"),
        ({"xft_max_seq_len": 2048}, "xFasterTransformer"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens 0"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
        ({"block_size": 0}, "--block-size 0"),
        ({"max_model_len": 1}, "--max-model-len 1"),
        ({"max_total_tokens": 0}, "--max-total-tokens 0"),
    ],
)
def test_each_flag_has_its_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError) as caught:
        refuse_unavailable(WorkerConfig(**settings))
    assert words in caught.value.message
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message


def test_contradictory_gpu_flags() -> None:
    with pytest.raises(StartupError) as caught:
        refuse_unavailable(WorkerConfig(gpus="0,1", num_gpus=3))
    assert caught.value.message == "Larger --num-gpus (3) than --gpus 0,1!"


def test_a_machine_needs_gpus_for_its_own_ranks_alone() -> None:
    config = WorkerConfig(gpus="0,1", tp_size=4)
    refuse_unavailable(config, num_local_ranks=2)
    with pytest.raises(StartupError, match=r"Larger --tp-size \(4\), of which 3 on this machine, than --gpus 0,1"):
        refuse_unavailable(config, num_local_ranks=3)


def test_the_launchers_defaults_pass() -> None:
    refuse_unavailable(WorkerConfig())
    refuse_unavailable(WorkerConfig(gpus="0,2", num_gpus=2, max_gpu_memory="13Gib", cpu_offloading=True))
    refuse_unavailable(
        WorkerConfig(
            gpus="0", num_gpus=1, max_gpu_memory="20GiB", gptq_wbits=16, gptq_groupsize=-1, limit_worker_concurrency=5
        )
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"load_8bit": True},
        {"load_4bit": True},
        {"load_8bit": True, "dummy": True},
        {"gptq_wbits": 3},
        {"gptq_ckpt": "x", "gptq_wbits": 4, "gptq_groupsize": 128, "gptq_act_order": True},
        {"awq_ckpt": "x", "awq_wbits": 4, "awq_groupsize": 128},
    ],
)
def test_loading_flags_pass(settings: dict[str, Any]) -> None:
    refuse_unavailable(WorkerConfig(**settings))


def test_the_scripted_engine_serves_on_one_machine_alone() -> None:
    config = WorkerConfig(tp_size=2, engine="fake")
    refuse_unavailable(config)
    with pytest.raises(StartupError, match="--engine fake serves on one machine alone"):
        refuse_unavailable(config, num_local_ranks=1)
