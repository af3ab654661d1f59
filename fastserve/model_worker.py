"""The model worker: `python -m fastserve.model_worker`. Serves one model and registers with a controller."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastserve.access.admin import ENV_ADMIN_KEY
from fastserve.access.api_keys import ENV_API_KEYS
from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from fastserve.config import WorkerConfig
from fastserve.distributed.gang import Gang
from fastserve.distributed.torchrun import drop_default_threads, read_torchrun, wait_for_first_rank
from fastserve.engine.client import ENGINE_ENVIRONMENT, EngineProcess
from fastserve.engine.contract import Engine
from fastserve.engine.settings import AdapterOptions, EngineConfig, PackedCheckpoint, PoolingOptions, WeightOptions
from fastserve.errors import StartupError
from fastserve.observability.logging import setup_logging
from fastserve.options import parse_config
from fastserve.serving.listen import advertised_address, bind
from fastserve.serving.server import run_entry, serve
from fastserve.serving.tls import check_tls, serves_tls
from fastserve.text.model_files import configured_eos_ids, read_json
from fastserve.worker.adapter_source import Adapter, find_adapters
from fastserve.worker.app import ModelWorker, WorkerSetup
from fastserve.worker.gang import RESTARTS, rank_environment, run_member
from fastserve.worker.keeper import RestartPolicy
from fastserve.worker.model_source import ModelSource, default_name, find_draft_model, find_model
from fastserve.worker.pooling_files import pooling_kind, read_pooling_options
from fastserve.worker.refusals import refuse_unavailable

logger = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None, gang: Gang | None = None) -> None:
    """`gang`: the machines that the model's ranks are on, if there are several."""

    def run() -> None:
        config = parse_config(WorkerConfig, argv, "fastserve-worker", os.environ)
        setup_logging(config.log_level, f"model_worker_{secrets.token_hex(4)}", os.environ)
        torchrun = read_torchrun(os.environ, config.tp_size)
        if torchrun is not None:
            if torchrun.rank > 0:
                logger.info("rank %d of torchrun waits: the process with LOCAL_RANK=0 starts all ranks", torchrun.rank)
                wait_for_first_rank()
                return
            drop_default_threads(os.environ)
            config = replace(config, tp_size=torchrun.size)
        refuse_unavailable(config, None if gang is None else gang.local_size)
        if config.gpus is not None:
            # For the engine's process, which inherits it; this process uses no GPU.
            os.environ["CUDA_VISIBLE_DEVICES"] = config.gpus
        _serve(config, gang)

    run_entry(run)


def _serve(config: WorkerConfig, gang: Gang | None) -> None:
    check_tls(config)
    # How soon a thread that tokenizes a long prompt yields the GIL to the event loop.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    rank_environ = {} if gang is None else rank_environment(config, gang, os.environ)
    model_names = config.model_names or (default_name(config.model_path),)
    if gang is not None and gang.part > 0:
        _drop_keys()
        model = find_model(config.model_path, config.revision, dummy=config.dummy)
        adapters = find_adapters(config, model_names)
        environ = ENGINE_ENVIRONMENT | os.environ | rank_environ
        run_member(config, gang, _engine_config(config, model, adapters, gang), environ)
        return
    sockets = bind(config.host, config.port)
    port = sockets[0].getsockname()[1]
    model = find_model(config.model_path, config.revision, dummy=config.dummy)
    adapters = find_adapters(config, model_names)
    worker = ModelWorker(
        WorkerSetup(
            config=config,
            engine=_make_engine(config, model, adapters, gang, rank_environ),
            model_dir=model.folder,
            tokenizer_dir=_tokenizer_dir(config, model),
            model_names=model_names,
            weight_paths=[path for path in (model.folder, model.gguf_file, model.adapter_dir) if path is not None],
            adapters=adapters,
            address=config.worker_address or advertised_address(config.host, port, ssl=serves_tls(config)),
            wait_listening=lambda: _wait_listening(sockets[0]),
            # Like Ctrl-C: uvicorn shuts down gracefully, and the code below runs.
            end_process=lambda: signal.raise_signal(signal.SIGINT),
            restart_policy=RestartPolicy() if gang is None else RESTARTS,
            has_other_machines=gang is not None,
        )
    )
    _drop_keys()
    serve(worker.app, config, sockets, before_shutdown=worker.deregister, wait_ready=worker.wait_loaded)
    if worker.failure is not None:
        raise worker.failure
    if worker.keeper.gave_up:
        sys.exit(1)


def _drop_keys() -> None:
    """The keys have been read; the engine's process must not inherit them."""
    for variable in (ENV_CLUSTER_KEY, ENV_ADMIN_KEY, ENV_API_KEYS):
        os.environ.pop(variable, None)


def _make_engine(
    config: WorkerConfig,
    source: ModelSource,
    adapters: Sequence[Adapter],
    gang: Gang | None,
    environment: dict[str, str],
) -> Engine:
    if config.engine == "fake":
        from fastserve.engine.fake import FakeEngine, FakeOptions, fake_pooling

        model = read_json(source.folder / "config.json")
        options = FakeOptions(
            vocab_size=int(model.get("vocab_size", 256)),
            max_model_len=config.max_model_len or int(model.get("max_position_embeddings", 4096)),
            eos_token_ids=configured_eos_ids(source.folder),
            max_num_seqs=config.max_num_seqs,
            token_s=0.005,
            adapters={one.name: one.path for one in adapters} if config.serves_adapters else None,
            pooling=fake_pooling(_pooling_options(config, source)),
        )
        return FakeEngine(options)
    return EngineProcess(
        _engine_config(config, source, adapters, gang), timeout_s=config.engine_timeout_s, environment=environment
    )


def _engine_config(
    config: WorkerConfig, source: ModelSource, adapters: Sequence[Adapter], gang: Gang | None
) -> EngineConfig:
    draft = None if config.speculative_model is None else find_draft_model(config.speculative_model)
    return EngineConfig.of(
        config,
        model_dir=str(source.folder),
        pooling_options=_pooling_options(config, source),
        tokenizer_dir=str(_tokenizer_dir(config, source)),
        log_level=config.log_level,
        speculative_model_dir=None if draft is None else str(draft.folder),
        speculative_gguf_file=None if draft is None or draft.gguf_file is None else str(draft.gguf_file),
        weights=_weight_options(config, source),
        adapters=_adapter_options(config, adapters),
        gang=gang,
    )


def _pooling_options(config: WorkerConfig, source: ModelSource) -> PoolingOptions | None:
    if source.gguf_file is not None and config.task is None:
        return None
    kind = pooling_kind(source.folder, config.task)
    return None if kind is None else read_pooling_options(source.folder, kind, config.pooling)


def _weight_options(config: WorkerConfig, source: ModelSource) -> WeightOptions:
    packed = None
    for method, path, bits, group in (
        ("gptq", config.gptq_ckpt, config.gptq_wbits, config.gptq_groupsize),
        ("awq", config.awq_ckpt, config.awq_wbits, config.awq_groupsize),
    ):
        if path is not None or bits != 16:
            packed = PackedCheckpoint(
                method, path, None if bits == 16 else bits, None if group == -1 else group,
                act_order=method == "gptq" and config.gptq_act_order,
            )  # fmt: skip
    return WeightOptions(
        quantize="int8" if config.load_8bit else "nf4" if config.load_4bit else None,
        packed=packed,
        gguf_file=None if source.gguf_file is None else str(source.gguf_file),
        adapter_dir=None if source.adapter_dir is None else str(source.adapter_dir),
        dummy=config.dummy,
    )


def _adapter_options(config: WorkerConfig, adapters: Sequence[Adapter]) -> AdapterOptions | None:
    if not config.serves_adapters:
        return None
    return AdapterOptions(
        modules=tuple((adapter.name, adapter.path) for adapter in adapters),
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        max_cpu_loras=config.max_cpu_loras,
        pool_size_lora=config.pool_size_lora,
        prefetch=config.prefetch,
        no_lora_compute=config.no_lora_compute,
        no_lora_swap=config.no_lora_swap,
        no_mem_pool=config.no_mem_pool,
        bmm=config.bmm,
    )


def _tokenizer_dir(config: WorkerConfig, source: ModelSource) -> Path:
    if config.tokenizer_path is None:
        return source.folder
    folder = Path(config.tokenizer_path).expanduser()
    if not folder.is_dir():
        raise StartupError(f"--tokenizer-path {config.tokenizer_path}: there is no such folder.")
    return folder


async def _wait_listening(sock: socket.socket) -> None:
    """Wait until the bound socket accepts connections."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        return


if __name__ == "__main__":
    main()
