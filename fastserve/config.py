"""Settings: one frozen dataclass per process. `fastserve/options.py` declares and parses options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

from fastserve.options import comma_list, json_list, limit, option, pass_on, same_option

CONTROLLER_PORT = 21001
WORKER_PORT = 21002
API_SERVER_PORT = 8000
HEARTBEAT_INTERVAL_S = 1.0
TOOL_CALL_PARSERS = (
    *("harmony", "qwen3_coder", "glm4", "kimi_k2", "deepseek_v32", "deepseek_v3", "deepseek_v31", "mistral_v11"),
    *("mistral", "functiongemma", "gemma4", "phi4", "hermes", "granite", "pythonic", "llama4_pythonic", "llama3_json"),
)
"""Names of `fastserve/text/forms/find.py`, which the launcher does not import."""
REASONING_PARSERS = ("none", "gpt_oss", "gemma4", "mistral", "granite", "qwen3", "deepseek_r1", "glm", "kimi_k2")
"""Names of `fastserve/text/reasoning.py`."""


@dataclass(frozen=True)
class ServerConfig:
    """Options of every HTTP process."""

    title: ClassVar[str] = "listening and logs"

    host: str = option("localhost", "address to listen on")
    port: int = option(API_SERVER_PORT, "port to listen on", minimum=0, maximum=65535)
    ssl: bool = option(False, "serve TLS with the key and certificate named by SSL_KEYFILE and SSL_CERTFILE")
    tls_cert: str | None = option(None, "serve TLS with this certificate chain, a PEM file", added=True)
    tls_key: str | None = option(None, "private key of --tls-cert, a PEM file", added=True)
    tls_ca: str | None = option(
        None,
        "PEM file of the authorities that the cluster's other services are verified with; controller and worker then "
        "accept only clients with a certificate of theirs",
        added=True,
    )
    tls_client_cert_required: bool = option(
        False, "accept only clients with a certificate of an authority in --tls-ca", added=True
    )
    drain_timeout_s: float = option(
        30.0, "seconds that running requests may take to end after SIGTERM", added=True, minimum=0
    )
    log_level: str = option("info", "logging level", choices=("debug", "info", "warning", "error"), added=True)
    max_connections: int = limit(
        8192, "open connections of all clients; never more than half of the files that the process may open"
    )
    max_connections_per_address: int = limit(
        1024, "open connections from one address; addresses of this machine are not bounded by it"
    )
    max_handshakes: int = limit(
        1024,
        "TLS handshakes under way, never more than a quarter of --max-connections; one address, unless it is of this "
        "machine, has half of them at most",
    )
    max_head_bytes: int = limit(32768, "request line and headers of a request, and trailers and framing of its body")
    max_header_lines: int = limit(100, "headers of a request")
    head_timeout_s: float = limit(
        10.0, "seconds until request line and headers are complete; a TLS handshake has as many", minimum=0.1
    )
    body_timeout_s: float = limit(60.0, "seconds until the body of a request is complete", minimum=0.1)
    keep_alive_timeout_s: float = limit(75.0, "seconds that a connection may idle between two requests", minimum=1)
    write_timeout_s: float = limit(
        60.0, "seconds that a client may take to read what the connection buffers", minimum=0.1
    )
    max_body_bytes: int = limit(8 * 2**20, "body of one request")
    max_buffered_bytes: int = limit(256 * 2**20, "bodies of all requests that run, together")
    max_long_body_bytes_per_s: float = limit(
        16 * 2**20, "bytes a second that are read of what bodies have beyond 64 KiB, of all requests together"
    )
    memory_high_mark: float = limit(
        0.97,
        "share of the memory that machine, container or process limit allow (a number above 1: bytes of this process) "
        "from which on new requests are refused",
        minimum=0.01,
    )

    @property
    def requires_client_cert(self) -> bool:
        """Whether TLS clients must show a certificate."""
        return self.tls_client_cert_required


@dataclass(frozen=True)
class AccessOptions:
    """Options for the access of services and administrators, and accepted host names."""

    title: ClassVar[str] = "access"

    cluster_key_file: str | None = option(
        None,
        "file with the cluster's keys, a KEY or OWNER KEY a line: the first is sent, all are accepted. Unset: "
        "FASTSERVE_CLUSTER_KEY, or among services on localhost a key that the first of them makes for this user",
        added=True,
    )
    insecure: bool = option(
        False,
        "neither ask other services for the cluster key nor send it: whoever reaches the port can use and change the "
        "cluster. FastChat's programs need it",
        added=True,
    )
    admin_key_file: str | None = option(
        None,
        "file with the keys, one a line, that open routes which change the service. Unset: FASTSERVE_ADMIN_KEY, or "
        "such routes answer to this machine only",
        added=True,
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "comma-separated names in Host headers that this service answers to, beside IP addresses, localhost and this "
        "machine's name; .example.com stands for all below it, * for all",
        parse=comma_list,
        added=True,
    )


@dataclass(frozen=True)
class ControllerConfig(AccessOptions, ServerConfig):
    """The controller: keeps the registry of workers and chooses one for each request."""

    title: ClassVar[str] = "controller"

    port: int = same_option(ServerConfig, "port", default=CONTROLLER_PORT)
    max_connections_per_address: int = same_option(ServerConfig, "max_connections_per_address", default=4096)
    max_body_bytes: int = same_option(ServerConfig, "max_body_bytes", default=2**20)
    dispatch_method: str = option("shortest_queue", "how a worker is chosen among those that serve the model")
    heartbeat_expiration_s: float = option(
        90.0,
        "seconds of silence after which a worker that does not state its own heartbeat interval is dropped "
        "(a fastserve worker states its interval and is dropped after three of them)",
        env="FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION",
        added=True,
        minimum=0.1,
    )
    max_workers: int = limit(20_000, "maximum number of registered workers")
    max_model_names: int = limit(10_000, "maximum number of model names, of all workers together")
    max_leases: int = limit(1_000_000, "maximum number of running requests, of all API servers together")
    model_memory_s: float = limit(
        900.0, "seconds for which a model whose last worker has gone is answered with 503 in place of 404", minimum=0
    )
    allowed_worker_networks: tuple[str, ...] = option(
        ("local",),
        "comma-separated networks that workers may be in, such as local,10.0.0.0/8: local is loopback and the subnets "
        "of this machine, any is everywhere",
        parse=comma_list,
        added=True,
    )
    no_worker_probe: bool = option(
        False,
        "list workers without calling them first, for a controller that cannot reach them where the API servers can",
        added=True,
    )
    max_worker_probes: int = limit(64, "workers that are called at once before they are listed")
    worker_probe_timeout_s: float = limit(2.0, "seconds that a worker may take to answer such a call", minimum=0.01)
    max_worker_status_bytes: int = limit(4 * 1024 * 1024, "longest status that is read from a worker")

    @property
    def requires_client_cert(self) -> bool:
        return self.tls_client_cert_required or self.tls_ca is not None


@dataclass(frozen=True)
class ApiServerConfig(AccessOptions, ServerConfig):
    """The OpenAI-compatible API server."""

    title: ClassVar[str] = "API server"

    controller_address: str = option(f"http://localhost:{CONTROLLER_PORT}", "the controller's address")
    allow_credentials: bool = option(False, "CORS: allow credentials")
    allowed_origins: tuple[str, ...] | None = option(
        None,
        "CORS: allowed origins, a JSON list. Unset: all, but without API keys on localhost only pages of this machine",
        parse=json_list,
    )
    allowed_methods: tuple[str, ...] = option(("*",), "CORS: allowed methods, a JSON list", parse=json_list)
    allowed_headers: tuple[str, ...] = option(("*",), "CORS: allowed headers, a JSON list", parse=json_list)
    api_keys: tuple[str, ...] | None = option(
        None,
        "comma-separated keys that clients must send as bearer tokens; prefer the environment variable "
        "FASTSERVE_API_KEYS or --api-keys-file, which do not show in the process list",
        parse=comma_list,
        env="FASTSERVE_API_KEYS",
    )
    api_keys_file: str | None = option(
        None,
        "file with one API key a line; `KEY priority` marks one whose requests may go before others. It is read again "
        "when it changes",
        added=True,
    )
    worker_timeout_s: float = option(
        100.0,
        "longest silence of a worker, in seconds, before a request to it is given up",
        env="FASTCHAT_WORKER_API_TIMEOUT",
        added=True,
        minimum=0.1,
    )
    max_attempts: int = limit(3, "maximum number of workers that one request is sent to, one after the other")
    retry_budget_percent: float = limit(
        20.0, "retries of all requests together, as a share of the requests of the last 10 s, in percent", minimum=0
    )
    min_retries_per_s: float = limit(
        10.0, "retries a second that are allowed on top of --retry-budget-percent", minimum=0
    )
    max_answer_bytes: int = limit(64 * 2**20, "longest whole answer of a worker; all that are held: twice as much")
    max_event_bytes: int = limit(4 * 2**20, "longest event in a worker's stream")
    max_stream_bytes: int = limit(2**30, "longest stream of a worker")
    max_hops: int = limit(4, "maximum number of API servers that a request passes through")
    responses_store: str | None = option(
        None,
        "SQLite file with stored responses and conversations (/v1/responses), one for all API servers of a machine; "
        "none: keep nothing. Unset: responses.sqlite3 in the user's folder for state, made at first use",
        added=True,
    )
    max_stored_entries: int = limit(100_000, "stored responses and conversations; the one used longest ago goes first")
    max_stored_bytes: int = limit(2**30, "content of the stored responses and conversations")
    max_stored_age_s: float = limit(30 * 86400.0, "seconds for which a response or conversation is stored unused")
    max_background_responses: int = limit(256, "responses that run in the background at once")
    batches_folder: str | None = option(
        None,
        "folder of the files and batches of /v1/files and /v1/batches, one for all API servers of a machine; none: "
        "keep none. Unset: `batches` in the user's folder for state, made at the first upload",
        added=True,
    )
    max_batch_files: int = limit(10_000, "files that are kept for batches")
    max_batch_file_bytes: int = limit(10 * 2**30, "bytes of all files that are kept for batches")
    max_batches: int = limit(100, "batches that wait or run")
    max_batch_requests: int = limit(50_000, "requests of one batch")
    batch_concurrency: int = limit(
        8, "requests of batches at once on each worker after some quiet seconds; beside others it is one"
    )


def is_hub_id(model: str) -> bool:
    """Whether `model` looks like a Hugging Face id: `name` or `owner/name`."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is not None


@dataclass(frozen=True)
class ModelConfig:
    """Which model to load and how (FastChat's shared model flags)."""

    title: ClassVar[str] = "model"

    model_path: str = option("fastserve-demo", "local folder, Hugging Face repository id, or fastserve-demo")
    revision: str = option("main", "revision on the Hugging Face hub")
    tokenizer_path: str | None = option(
        None, "folder of the tokenizer and its chat template; the model's own if unset", added=True
    )
    gpus: str | None = option(None, "GPU ids to use, such as 1 or 0,2")
    load_8bit: bool = option(False, "keep the weights of linear layers in 8 bits, quantized while they are read")
    load_4bit: bool = option(
        False, "keep the weights of linear layers in 4 bits (nf4), quantized while they are read", added=True
    )
    gptq_ckpt: str | None = option(
        None,
        "file or folder of GPTQ weights for the model; its own folder if unset. A checkpoint whose config.json says "
        "how it is quantized needs none of the gptq and awq flags",
    )
    gptq_wbits: int = option(16, "bits of the GPTQ weights; 16: none are looked for", choices=(2, 3, 4, 8, 16))
    gptq_groupsize: int = option(-1, "inputs that share a scale in the GPTQ weights; -1: as they have it")
    gptq_act_order: bool = option(False, "the GPTQ weights must have an order of activations (g_idx)")
    awq_ckpt: str | None = option(None, "file or folder of AWQ weights for the model; its own folder if unset")
    awq_wbits: int = option(16, "bits of the AWQ weights; 16: none are looked for", choices=(4, 16))
    awq_groupsize: int = option(-1, "inputs that share a scale in the AWQ weights; -1: as they have it")
    dummy: bool = option(
        False, "random weights: needs config.json and the tokenizer, and no file of weights", added=True
    )
    enable_exllama: bool = option(False, "use ExLlamaV2")
    exllama_max_seq_len: int = option(4096, "ExLlamaV2: longest sequence")
    exllama_gpu_split: str | None = option(None, "ExLlamaV2: GB per GPU, such as 20,7,7")
    exllama_cache_8bit: bool = option(False, "ExLlamaV2: 8-bit KV cache")
    enable_xft: bool = option(False, "use xFasterTransformer")
    xft_max_seq_len: int = option(4096, "xFasterTransformer: longest sequence")
    xft_dtype: str | None = option(
        None, "xFasterTransformer: dtype", choices=("fp16", "bf16", "int8", "bf16_fp16", "bf16_int8")
    )


@dataclass(frozen=True)
class EngineOptions:
    """Options that are passed to the engine unchanged (see `EngineConfig`)."""

    title: ClassVar[str] = "engine"

    device: str | None = option(
        None, "device; detected if unset", choices=("cpu", "cuda", "mps", "xpu", "npu"), group="model"
    )
    num_gpus: int = option(1, "number of GPUs to spread the model's layers over", group="model")
    tp_size: int = option(
        1,
        "tensor parallelism: number of processes (ranks) that compute the model together, each with a part of every "
        "layer on CPU cores or a GPU of its own",
        alias="--tensor-parallel-size",
        added=True,
        minimum=1,
        maximum=64,
        group="model",
    )
    enable_expert_parallel: bool = option(
        False,
        "with --tp-size: give each rank some experts of a mixture of experts whole, instead of a part of every expert",
        added=True,
        group="model",
    )
    machine_collectives: str | None = option(
        None,
        "how GPUs of several machines exchange tensors: nccl (if unset; not encrypted, so their network must be "
        "private), or host: through the hosts' memory, encrypted with the cluster key",
        added=True,
        choices=("nccl", "host"),
        group="model",
    )
    max_gpu_memory: str | None = option(
        None,
        "maximum weights on one GPU, such as 13GiB or 13GB; used with several GPUs or --cpu-offloading only",
        group="model",
    )
    dtype: str | None = option(
        None,
        "dtype of weights and KV cache; unset: the checkpoint's own (on a GPU, float32 becomes float16; on a CPU, what "
        "it has no instructions for becomes float32)",
        choices=("float32", "float16", "bfloat16"),
        group="model",
    )
    cpu_offloading: bool = option(
        False,
        "keep layers that the GPUs do not hold in the machine's memory, then on disk, and compute them on the CPU",
        group="model",
    )
    max_model_len: int | None = option(
        None,
        "longest prompt and answer together, in tokens (one of each at least); from the model if unset",
        alias="--max_req_total_len",
        added=True,
        minimum=2,
    )
    max_total_tokens: int | None = option(
        None,
        "size of the KV cache in tokens; from free memory if unset",
        alias="--max_total_token_num",
        added=True,
        minimum=1,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "share of the device's free memory that weights and KV cache may take",
        added=True,
        minimum=0.001,
        maximum=1,
    )
    block_size: int = option(16, "tokens in a block of the KV cache", added=True, minimum=1)
    max_num_batched_tokens: int | None = option(
        None,
        "token budget of one engine step; if unset 256 on a CPU, 2048 elsewhere",
        alias="--batch_max_tokens",
        added=True,
        minimum=1,
    )
    max_num_seqs: int = option(
        256,
        "maximum number of sequences in one engine step",
        alias="--running_max_req_size",
        added=True,
        minimum=1,
    )
    no_prefix_cache: bool = option(False, "do not reuse KV cache blocks of equal prompt prefixes", added=True)
    speculative_method: str = option(
        "ngram",
        "speculative decoding, used where it is faster: ngram (drafts what followed the last tokens before), or off; "
        "answers are the same",
        choices=("ngram", "off"),
        added=True,
    )
    num_speculative_tokens: int = option(
        8,
        "maximum number of draft tokens per sequence and step; none with --speculative-method off",
        added=True,
        minimum=1,
    )
    scheduler: str = option(
        "slora",
        "order in which waiting requests start: slora (first come, first served), vtc_fair (equal shares for all "
        "adapters), cluster (few adapters at once), abort (gives up what would come too late)",
        choices=("slora", "vtc_fair", "cluster", "abort", "pets", "peft"),
        added=True,
    )
    fair_weights: tuple[str, ...] = option(
        (),
        "--scheduler vtc_fair: shares of adapters, NAME=WEIGHT, or weights in the order of the adapters, also "
        "separated by commas; 1 where none is given",
        repeatable=True,
        added=True,
    )
    batch_num_adapters: int | None = option(
        None, "number of adapters that --scheduler cluster runs at once, and implies it", added=True, minimum=1
    )
    enable_abort: bool = option(False, "the same as --scheduler abort", added=True)
    first_token_slo_s: float = option(
        6.0,
        "--scheduler abort: seconds to the first token, after which a request is given up with status 503",
        added=True,
        minimum=0.1,
    )
    max_grammar_fuel: int = limit(
        300_000, "work on the regular expressions of a grammar when it is compiled: about 3,000 in a millisecond"
    )
    max_cached_grammar_bytes: int = limit(
        2**20, "texts of compiled grammars that are kept while no request uses them; one takes up to 200 times its text"
    )
    debug: bool = option(False, "print the model", group="worker")
    profile_steps: int = option(
        0,
        "record so many engine steps under load and write a trace that torch's tools and Perfetto open",
        added=True,
        group="worker",
    )
    profile_dir: str = option("logs", "folder of the traces", added=True, group="worker")
    trust_remote_code: bool = option(False, "run Python code that comes with the model", added=True, group="worker")


@dataclass(frozen=True)
class LoraOptions:
    """LoRA adapters that a worker serves beside its base model (vLLM's and S-LoRA's flags)."""

    title: ClassVar[str] = "adapters"

    enable_lora: bool = option(
        False,
        "serve adapters that are loaded while the worker runs; implied by --lora-modules, --lora-dirs and --lora-root",
        added=True,
    )
    lora_modules: tuple[str, ...] = option(
        (),
        'adapters, each NAME=PATH or {"name": NAME, "path": PATH}; PATH is a folder as PEFT saves it, a Hugging Face '
        "repository id, or the name of an adapter of the demo model",
        repeatable=True,
        env="LORA_INFO",
        added=True,
    )
    lora_dirs: tuple[str, ...] = option(
        (),
        "adapters, each PATH or NAME=PATH; the name of PATH is its last part. PATH-1, PATH-2, ... are PATH under names "
        "of their own where there is no folder of that name",
        repeatable=True,
        added=True,
    )
    lora_root: str | None = option(
        None, "folder of adapters, served by the names of their folders; new ones are found while serving", added=True
    )
    allow_any_lora_path: bool = option(
        False,
        "let administrators load adapters from any path and from the Hugging Face hub; else only from --lora-root and "
        "the paths of the other flags",
        added=True,
    )
    lora_state_file: str | None = option(
        None,
        "file in which a worker keeps what calls have loaded and unloaded, to do so again when it is started anew; the "
        "launcher gives each worker one in --log-dir",
        added=True,
    )
    max_loras: int = option(
        32, "maximum number of different adapters in one engine step", added=True, minimum=1, maximum=4096
    )
    max_lora_rank: int = option(
        64, "highest rank of an adapter; one of a higher rank is refused", added=True, minimum=1, maximum=256
    )
    max_cpu_loras: int = option(
        256, "maximum number of adapters that are kept in the machine's memory", added=True, minimum=1, maximum=65536
    )
    pool_size_lora: int = option(
        0, "tokens by which the KV cache is larger, as room for adapters", added=True, minimum=0, maximum=10**9
    )
    prefetch: bool = option(True, "read the adapters of waiting requests while others run", added=True)
    no_lora_compute: bool = option(
        False, "for measurements: load adapters and leave out their products; answers are the base model's", added=True
    )
    no_lora_swap: bool = option(False, "for measurements: adapters stay on the device", added=True)
    no_mem_pool: bool = option(
        False, "for measurements: adapters in memory of their own, not in blocks of the KV cache", added=True
    )
    bmm: bool = option(False, "for measurements: pad all adapters of a step to the highest rank", added=True)

    @property
    def serves_adapters(self) -> bool:
        modules = any("".join(text.split()) != "{}" for text in self.lora_modules)  # rtp-llm's default of LORA_INFO
        return bool(self.enable_lora or modules or self.lora_dirs or self.lora_root)


@dataclass(frozen=True)
class WorkerConfig(LoraOptions, EngineOptions, ModelConfig, AccessOptions, ServerConfig):
    """The model worker: loads one model and generates."""

    title: ClassVar[str] = "worker"

    speculative_model: str | None = option(
        None,
        "draft model with the same vocabulary, in place of --speculative-method: folder, GGUF file or repository id",
        added=True,
        group="engine",
    )

    port: int = same_option(ServerConfig, "port", default=WORKER_PORT)
    max_connections_per_address: int = same_option(ServerConfig, "max_connections_per_address", default=4096)
    worker_address: str | None = option(None, "address that the controller gets; from host and port if unset")
    controller_address: str = option(f"http://localhost:{CONTROLLER_PORT}", "the controller's address")
    model_names: tuple[str, ...] | None = option(
        None, "comma-separated names to serve the model under; last part of the model path if unset", parse=comma_list
    )
    conv_template: str | None = option(
        None, "chat template by FastChat's name, such as vicuna_v1.1, for a model that comes without one"
    )
    chat_template: str | None = option(
        None,
        "file with a Jinja chat template to use instead of the model's own, or a name as for --conv-template",
        added=True,
    )
    tool_call_parser: str | None = option(
        None,
        "form of tool calls; found in the chat template if unset",
        choices=TOOL_CALL_PARSERS,
        added=True,
    )
    reasoning_parser: str | None = option(
        None,
        "marks of reasoning; found in the chat template if unset",
        choices=REASONING_PARSERS,
        added=True,
    )
    trust_request_chat_template: bool = option(
        False,
        "let requests bring a chat template, which is a program: one that never ends holds a thread for good",
        added=True,
    )
    task: str | None = option(
        None,
        "what the model does: generate, embed (vectors of texts) or classify (scores of texts and pairs); from its "
        "files if unset",
        choices=("generate", "embed", "classify"),
        added=True,
    )
    pooling: str | None = option(
        None,
        "how a model that embeds makes one vector of those of its tokens; if unset as sentence-transformers' files "
        "say, else the last token for decoders and the mean for others",
        choices=("cls", "mean", "max", "last"),
        added=True,
    )
    embed_in_truncate: bool = option(False, "the same as --embedding-long-inputs truncate")
    embedding_long_inputs: str | None = option(
        None,
        "texts that are too long for a model that embeds: refuse, truncate, or chunk (the average of their parts' "
        "vectors). If unset OpenAI's routes refuse them and FastChat's chunks them",
        choices=("refuse", "truncate", "chunk"),
        added=True,
    )
    limit_worker_concurrency: int | None = option(
        None, "maximum number of requests that generate at once; bounded by the KV cache alone if unset", minimum=1
    )
    queue_size: int = limit(1024, "maximum number of waiting requests; past that the answer is 429", minimum=0)
    max_queued_tokens: int = limit(
        2_097_152, "maximum number of prompt tokens of all waiting requests; past that the answer is 429"
    )
    max_adapters: int = limit(4096, "maximum number of adapters that a worker knows by name", maximum=4096)
    max_pooling_tokens: int = limit(
        1_048_576, "tokens of all texts of one request for vectors or scores", maximum=2**30
    )
    max_pooling_answer_bytes: int = limit(
        48 * 2**20, "longest answer with vectors; numbers in JSON count as 22 bytes, in base64 as 5 and a third"
    )
    max_messages: int = limit(4096, "maximum number of messages in one chat")
    max_content_parts: int = limit(4096, "maximum number of content parts and tool calls in one chat")
    max_tools: int = limit(1024, "maximum number of tools in one chat")
    max_tool_bytes: int = limit(1_048_576, "longest tools of one chat, in bytes of JSON")
    max_prompts: int = limit(2048, "maximum number of prompts in one completion request")
    max_stop_chars: int = limit(1024, "longest stop string, in characters")
    max_stop_token_ids: int = limit(1024, "maximum number of stop_token_ids in one request")
    max_logit_bias: int = limit(4096, "maximum number of entries of logit_bias in one request")
    max_grammar_bytes: int = limit(65_536, "longest schema, regular expression or grammar of an answer's format")
    max_prompt_logprobs: int = limit(
        1_000_000, "maximum number of log probabilities of prompt tokens (tokens times top entries) in one request"
    )
    max_json_depth: int = limit(
        64, "deepest nesting of arrays and objects in a body, and in the arguments of tool calls"
    )
    max_json_containers: int = limit(
        262_144, "maximum number of opening brackets and braces in a body, including those in its strings"
    )
    prompt_threads: int = limit(
        2, "threads that read bodies, render chat templates and tokenise; one more takes bodies over 256 KiB"
    )
    max_preparing: int = limit(
        256,
        "maximum number of requests whose body waits to be read, rendered and tokenised; past that the answer is 429",
    )
    max_refused_prompt_percent: float = limit(
        20, "share of such a thread's time that bodies which are refused may take", minimum=0.1
    )
    template_timeout_s: float = limit(10.0, "longest time in which a chat template may render", minimum=0.1)
    stream_interval: int = option(
        2, "tokens between two chunks of a stream (the first token is sent at once)", minimum=1
    )
    no_register: bool = option(False, "do not register with a controller: a server of its own, with API keys if set")
    api_keys: tuple[str, ...] | None = same_option(
        ApiServerConfig, "api_keys", added=True, help="with --no-register: as for the API server"
    )
    api_keys_file: str | None = same_option(
        ApiServerConfig, "api_keys_file", help="with --no-register: as for the API server"
    )
    seed: int | None = option(None, "seed of requests that bring none")
    engine: str = option(
        "native",
        "which engine generates: native, or fake (scripted, for tests)",
        choices=("native", "fake"),
        added=True,
    )
    engine_timeout_s: float = option(
        120.0,
        "seconds without a sign of life from the engine, which gives one each step and each second while idle, after "
        "which it counts as hung: it is killed, its requests fail, and it is started again",
        added=True,
        minimum=2,  # an idle engine sends a sign of life each second
    )
    heartbeat_interval_s: float = option(
        HEARTBEAT_INTERVAL_S,
        "seconds between two heartbeats",
        env="FASTCHAT_WORKER_HEART_BEAT_INTERVAL",
        added=True,
        minimum=0.01,
        maximum=3600,
    )

    @property
    def long_texts(self) -> Literal["refuse", "truncate", "chunk"] | None:
        """How a model that embeds treats texts that are too long; None: each route has its own default."""
        chosen = "truncate" if self.embed_in_truncate else self.embedding_long_inputs
        return cast(Literal["refuse", "truncate", "chunk"] | None, chosen)

    @property
    def requires_client_cert(self) -> bool:
        # Without a controller it serves clients directly, like an API server.
        return self.tls_client_cert_required or (self.tls_ca is not None and not self.no_register)


@dataclass(frozen=True)
class ClassicLauncherFlags:
    """The flags of Langchain-Chatchat's launcher. Their abbreviations win over those of newer flags."""

    title: ClassVar[str] = "launcher"

    model_path_address: tuple[str, ...] = option(
        ("fastserve-demo@localhost@20002",),
        "one item for each worker: MODEL@HOST@PORT, or MODEL@HOST@PORT?OPTION=VALUE&OPTION=VALUE with options of that "
        "worker alone, such as device, gpus, num-gpus, model-names, dtype (put it in quotes)",
        parse=str,
        nargs="+",
        group="workers",
    )
    controller_host: str = option("localhost", "address that the controller listens on", group="controller")
    controller_port: int = option(CONTROLLER_PORT, "port that the controller listens on", group="controller")
    dispatch_method: str = same_option(ControllerConfig, "dispatch_method")
    worker_host: str = option("localhost", "has no effect: each item of --model-path-address names its host")
    worker_port: int = option(WORKER_PORT, "has no effect: each item of --model-path-address names its port")
    model_path: str = option("lmsys/vicuna-7b-v1.3", "has no effect: each item of --model-path-address names its model")
    revision: str = same_option(WorkerConfig, "revision")
    device: str | None = same_option(
        WorkerConfig, "device", help="device; if unset each worker takes the best it finds: cuda, mps, xpu, else cpu"
    )
    gpus: str | None = same_option(
        WorkerConfig, "gpus", help="GPU ids to use, such as 1 or 0,2; CUDA_VISIBLE_DEVICES decides if unset"
    )
    num_gpus: int = same_option(WorkerConfig, "num_gpus")
    max_gpu_memory: str | None = same_option(WorkerConfig, "max_gpu_memory", default="20GiB")
    load_8bit: bool = same_option(WorkerConfig, "load_8bit")
    cpu_offloading: bool = same_option(WorkerConfig, "cpu_offloading")
    gptq_ckpt: str | None = same_option(WorkerConfig, "gptq_ckpt")
    gptq_wbits: int = same_option(WorkerConfig, "gptq_wbits")
    gptq_groupsize: int = same_option(WorkerConfig, "gptq_groupsize")
    gptq_act_order: bool = same_option(WorkerConfig, "gptq_act_order")
    model_names: tuple[str, ...] | None = same_option(
        WorkerConfig, "model_names", help="comma-separated names that every worker serves its model under"
    )
    limit_worker_concurrency: int | None = same_option(WorkerConfig, "limit_worker_concurrency")
    stream_interval: int = same_option(WorkerConfig, "stream_interval")
    no_register: bool = same_option(WorkerConfig, "no_register")
    server_host: str = option("localhost", "address that the API server listens on", group="API server")
    server_port: int = option(8888, "port that the API server listens on", group="API server")
    allow_credentials: bool = same_option(ApiServerConfig, "allow_credentials")
    api_keys: tuple[str, ...] | None = same_option(ApiServerConfig, "api_keys")


SERVICE_OPTIONS = tuple(
    item.name
    for item in fields(ControllerConfig)
    if {item.name} <= {other.name for other in fields(ApiServerConfig)} & {other.name for other in fields(WorkerConfig)}
    and item.name not in ("host", "port")
)
"""Options that all services have, and the launcher passes on."""


@dataclass(frozen=True)
@pass_on(ControllerConfig, ApiServerConfig, WorkerConfig, names=SERVICE_OPTIONS)
class LauncherConfig(ClassicLauncherFlags, LoraOptions, EngineOptions, AccessOptions):
    """The launcher: starts a controller, model workers and an API server, and waits until they serve."""

    title: ClassVar[str] = "launcher"
    renamed_groups: ClassVar[Mapping[str, str]] = {
        "model": "workers",
        "engine": "workers",
        "worker": "workers",
        "adapters": "workers",
        "listening and logs": "every service",
    }

    tp_size: int = same_option(WorkerConfig, "tp_size")
    dtype: str | None = same_option(WorkerConfig, "dtype", added=True)
    load_4bit: bool = same_option(WorkerConfig, "load_4bit", added=True)
    awq_ckpt: str | None = same_option(WorkerConfig, "awq_ckpt", added=True)
    awq_wbits: int = same_option(WorkerConfig, "awq_wbits", added=True)
    awq_groupsize: int = same_option(WorkerConfig, "awq_groupsize", added=True)
    dummy: bool = same_option(WorkerConfig, "dummy", added=True)
    chat_template: str | None = same_option(WorkerConfig, "chat_template", added=True)
    task: str | None = same_option(WorkerConfig, "task", added=True)
    pooling: str | None = same_option(WorkerConfig, "pooling", added=True)
    tool_call_parser: str | None = same_option(WorkerConfig, "tool_call_parser", added=True)
    reasoning_parser: str | None = same_option(WorkerConfig, "reasoning_parser", added=True)
    seed: int | None = same_option(WorkerConfig, "seed", added=True)
    debug: bool = same_option(WorkerConfig, "debug", added=True)
    engine: str = same_option(WorkerConfig, "engine", added=True)
    api_keys_file: str | None = same_option(ApiServerConfig, "api_keys_file", added=True)
    allowed_origins: tuple[str, ...] | None = same_option(ApiServerConfig, "allowed_origins", added=True)
    responses_store: str | None = same_option(ApiServerConfig, "responses_store", added=True)
    allowed_worker_networks: tuple[str, ...] = same_option(ControllerConfig, "allowed_worker_networks")
    no_worker_probe: bool = same_option(ControllerConfig, "no_worker_probe")
    ssl: bool = same_option(ServerConfig, "ssl", added=True)
    log_dir: str = option("logs", "folder of the services' logs; the shutdown command is given the same", added=True)
    wait_timeout_s: float = option(1800.0, "seconds that the services may take until they serve", added=True, minimum=0)
    restart: bool = option(
        True,
        "start a service again that died, after a pause of 1 s that doubles up to 60 s; one that was ended on purpose "
        "(SIGTERM, Ctrl-C, exit code 0) stays away",
        added=True,
    )
    log_max_bytes: int = limit(
        20_000_000, "size of a log; a larger one becomes LOG.1, that one LOG.2, ...", minimum=10_000, group="launcher"
    )
    log_keep: int = limit(5, "old logs that are kept of each service: LOG.1 is the newest", group="launcher")


SERVICE_KINDS = ("controller", "model_worker", "openai_api_server")


@dataclass(frozen=True)
class ShutdownConfig:
    """Ends what launchers started: running requests may finish first; what still runs after that is killed."""

    title: ClassVar[str] = "shutdown"

    serve: str = option("all", "which services to end", choices=("all", *SERVICE_KINDS))
    down: str | None = option(None, "the same as --serve", choices=("all", *SERVICE_KINDS))
    log_dir: str = option("logs", "the launcher's --log-dir")
    server_port: int | None = option(None, "end only the launch whose API server has this port")
    drain_timeout_s: float | None = option(
        None,
        "seconds until a service that still runs is killed; if unset 5 more than its own --drain-timeout-s",
        minimum=0,
    )
