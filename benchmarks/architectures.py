"""Every causal architecture of transformers as a tiny random model: `python -m benchmarks.architectures`.

Those of `COMPOSITES`, models of images and text whose language model is served, are tried beside them.

Each is saved to a folder and served by the engine in float32 and in bfloat16: prompts in chunks and in one batch, with
lengths beyond each window, chunk and original length of the configuration, then greedy decoding. All logprobs of
prompts and answers are compared with the model's own eager forward pass over the whole sequences: in float32 up to
rounding, in bfloat16 up to the distance between the model's own bfloat16 and float32 passes.

`--results FILE` keeps one JSON line for each architecture; `--resume` skips those in the file. `--write` puts the table
into docs/models.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import random
import re
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineInfo, EngineRequest, SamplingParams, TokenLogprob
from fastserve.engine.loading.skeleton import auto_class
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 300
CONTEXT = 256
WINDOW = 8
ORIGINAL_LENGTH = 16
PROMPT_LENGTHS = (90, 41, 7)
NUM_DECODED = 8
CHUNK = 32
"""Tokens of a step: long prompts take several."""
MAX_PARAMETERS = 40_000_000
EXACT, REFUSED, WRONG, TRACEBACK = "exact", "refused", "WRONG", "TRACEBACK"
TOLERANCE = 1e-3
"""Largest difference of a logprob in float32."""
BFLOAT16_RATIO = 2.0
"""Largest distance from float32, relative to that of the model's own bfloat16 pass; see `_typical_distance`."""
DOC = Path(__file__).parents[1] / "docs/models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"

# ---- small configurations ---------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"), 64),
    **dict.fromkeys(("output_embedding_size", "hidden_size_per_layer_input", "dense_intermediate_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_inner", "dff", "dim_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "feed_forward_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size",), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads", "index_n_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "mamba_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "dim_head", "d_head", "index_head_dim"), 16),
    **dict.fromkeys(("attention_head_size", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("query_pre_attn_scalar", "mamba_head_dim", "mamba_d_head", "attention_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank"), 16),
    **dict.fromkeys(("loop_gate_rank", "gated_norm_rank", "hc_lowrank", "d_rel"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), CONTEXT),
    **dict.fromkeys(("max_target_positions", "context_length"), CONTEXT),
    **dict.fromkeys(("original_max_position_embeddings", "floor_scale", "log_scaling_n_floor"), ORIGINAL_LENGTH),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("local_attention", "keep_window_size"), WINDOW),
    "attention_chunk_size": ORIGINAL_LENGTH,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_dense_layers", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("no_rope_layer_interval", "decoder_sparse_step", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("sliding_window_pattern", "attn_layer_period", "layer_group_size"), 2),
    "attn_layer_offset": 1,
    **dict.fromkeys(
        (
            "num_nextn_predict_layers",
            "num_kv_shared_layers",
        ),
        0,
    ),
    **dict.fromkeys(("max_window_layers", "o_groups", "zero_expert_num"), 2),
    "is_decoder": True,
    "is_encoder_decoder": False,
    "use_sliding_window": True,
    "initializer_range": 0.1,
}
"""Small values of fields by name, for each model whose configuration has the field."""
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
              "num_decoder_layers", "num_encoder_layers", "num_blocks")  # fmt: skip
MAX_LAYERS = 6
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL_LENGTH}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA_2,
    "blt": {
        "patch_in_forward": False, "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 64},
        "decoder_config": {"vocab_size": VOCABULARY, "hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "n_input_layers": 1,
        "n_recurrent_layers": 2, "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
                   "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "falcon_h1": {**MAMBA_2, "mamba_d_ssm": 128},
    "gemma4_assistant": {
        "default": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "qwen2_5_vl": {"text": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}, "vision_config": {"depth": 1}},
    "qwen2_vl": {
        "text": {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}},
        "vision_config": {"embed_dim": 64, "hidden_size": 64, "depth": 1, "num_heads": 4},
    },
    "granitemoehybrid": MAMBA_2,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "glm4v": {"text": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_vl": {"text": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": HEADS,
    "ministral3": {"rope_parameters": YARN | {"type": "yarn", "llama_4_scaling_beta": 0.5}},
    "nemotron": HEADS,
    "qwen3_vl": {"vision_config": {"depth": 1, "deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {"vision_config": {"depth": 1, "deepstack_visual_indexes": [0]}},
    "qwen4_exp": {"text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                           "indexer_compress_ratio": 2}},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "num_buckets": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Fields of single models that the rules above do not make consistent, or for the part of a model that it is about.
"default": arguments of the configuration from which sizes are read; "text": fields of its text part."""
COMPOSITES = (
    "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "fast_vlm", "glm4v", "idefics2", "idefics3", "internvl",
    "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_onevision", "mistral3", "ovis2", "paligemma",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["full_attention"] * 2}),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "llama, llama3 RoPE": ("llama", {"rope_parameters": ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_LENGTH}}),
    "llama, dynamic RoPE": ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0}}),
    "phi3, LongRoPE": ("phi3", {"rope_parameters": ROPE | {
        "rope_type": "longrope", "short_factor": [1.2] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 2 * ORIGINAL_LENGTH}}),
}  # fmt: skip
"""Settings by which the same code computes something else: model type and fields."""
WITHOUT_MODEL = ("musicgen", "musicgen_melody")
"""Listed by transformers for a configuration from which it makes no model: only their refusal is looked at."""


def small_config(name: str) -> PretrainedConfig:
    """The configuration of model type `name` with small sizes, and layers of every kind that its default has."""
    name, fields_of_variant = VARIANTS.get(name, (name, {}))
    overrides = copy.deepcopy(OVERRIDES.get(name, {})) | fields_of_variant
    kind = CONFIG_MAPPING[name]
    default = kind(**overrides.pop("default", {}))
    text = default.get_text_config(decoder=True)
    of_text = overrides.pop("text", {})
    fields: dict[str, Any] = {}
    for key, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            others = overrides.pop(key, {}) if part is not text else of_text
            fields[key] = {"model_type": part.model_type} | _small_fields(part) | others
    if all(part is not text for part in vars(default).values()):
        fields |= _small_fields(default)
    return kind(**fields | overrides)


def _small_fields(default: PretrainedConfig) -> dict[str, Any]:
    stated = default.to_dict()
    fields = {key: value for key, value in SMALL.items() if stated.get(key) is not None}
    for kv_heads in ("num_key_value_heads", "swa_num_key_value_heads"):
        heads = kv_heads.replace("key_value", "attention")
        if kv_heads in fields and stated.get(kv_heads) == stated.get(heads):
            fields[kv_heads] = fields[heads]
    if "qk_rope_head_dim" in fields:
        fields |= {key: size for key, size in (("head_dim", 8), ("qk_head_dim", 16)) if key in stated}
    fields |= {key: 0 for key in stated if key.endswith("_token_id") and isinstance(stated[key], int | list)}
    rope = stated.get("rope_parameters")
    if isinstance(rope, dict):
        fields["rope_parameters"] = _small_rope(rope)
    count_name = next((key for key in NUM_LAYERS if isinstance(stated.get(key), int)), None)
    if count_name is not None:
        count = stated[count_name]
        lists = {key: value for key, value in stated.items() if isinstance(value, list) and len(value) == count}
        kept = _one_of_each(list(zip(*lists.values(), strict=True)) if lists else [()] * count)
        varies = not lists and any(key in fields for key in ("no_rope_layer_interval", "decoder_sparse_step"))
        kept = kept if len(kept) > 1 else list(range(min(count, 4 if varies else 2)))
        fields |= {key: len(kept) for key in NUM_LAYERS if key in stated and isinstance(stated[key], int)}
        fields |= {key: [value[index] for index in kept] for key, value in lists.items()}
    return fields


def _one_of_each(kinds: list[tuple[Any, ...]]) -> list[int]:
    """Indices of the first layer of each kind, in order."""
    first: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(repr(kind), index)
    return sorted(first.values())[:MAX_LAYERS]


def _small_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    small = {key: _small_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if rope.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = ORIGINAL_LENGTH
    return small


def save_model(config: PretrainedConfig, folder: Path, seed: int) -> None:
    """Random weights in which each parameter matters: those initialised to zeros or ones too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in auto_class(config).from_config(config).parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"the small model has {count:,} parameters")
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.is_floating_point():
                    # Exact in bfloat16, so that both dtypes have the same weights.
                    weight.copy_((weight + torch.randn_like(weight) * 0.1).bfloat16())
        model.save_pretrained(folder)


# ---- one architecture -------------------------------------------------------------------------------------------


@dataclass
class Row:
    name: str
    """model_type"""
    outcome: str
    detail: str = ""
    """Of a refusal its sentence, of a failure what differed or was raised."""
    forward_pass: str = ""
    fused: str = ""
    distances: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def check(name: str) -> Row:
    """Serve a tiny model of type `name` in both dtypes, and compare it with its own forward pass."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            config = small_config(name)
            if name not in WITHOUT_MODEL:
                _save(config, Path(scratch), zlib.crc32(name.encode()))
            # The whole configuration, where the model saves that of its text part alone.
            config.save_pretrained(scratch)
        except Exception:  # noqa: BLE001  # whatever it raises is the result
            return Row(name, TRACEBACK, "no small model can be made: " + traceback.format_exc(limit=-3))
        row = Row(name, EXACT)
        for dtype in DTYPES:
            try:
                compare(row, scratch, dtype)
            except StartupError as error:
                row.outcome, row.detail = REFUSED, str(error)
            except Exception:  # noqa: BLE001  # whatever it raises is the result
                row.outcome, row.detail = TRACEBACK, f"{dtype}: " + traceback.format_exc(limit=-4)
            if row.outcome != EXACT:
                break
    row.seconds = time.perf_counter() - begin
    gc.collect()
    return row


def compare(row: Row, folder: str, dtype: str) -> None:
    """Serve the model in `folder`, compare it with its own forward pass, and note the outcome in `row`. Raises what the
    engine raises."""
    config = EngineConfig(
        model_dir=folder, device="cpu", dtype=dtype, max_num_seqs=4, max_num_batched_tokens=CHUNK,
        max_total_tokens=512, speculative_method="off",
    )  # fmt: skip
    core = build_core(config, lambda *_: None)
    rng = random.Random(7)
    longest = core.info.max_model_len - NUM_DECODED
    params = SamplingParams(NUM_DECODED, temperature=0.0, logprobs=VOCABULARY, prompt_logprobs=VOCABULARY)
    requests = [
        EngineRequest(f"{index}", [rng.randrange(3, VOCABULARY) for _ in range(min(length, longest))], params)
        for index, length in enumerate(PROMPT_LENGTHS)
    ]
    answers: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
    for request in requests:
        refused = core.add(request)
        if refused is not None:
            raise RuntimeError(f"a plain request is refused: {refused.error}")
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += (output.prompt_logprobs or []) + (output.logprobs or [])
    row.forward_pass, row.fused = _forward_pass(core.info), _fused(core.info)
    found = [_table(answers[request.request_id]) for request in requests]
    sequences = [
        request.prompt_ids + [token.token_id for token in answers[request.request_id][len(request.prompt_ids) - 1 :]]
        for request in requests
    ]
    exact = own_logprobs(folder, sequences, torch.float32)
    if dtype == "float32":
        row.distances[dtype] = distance = max(_max_distance(*pair) for pair in zip(found, exact, strict=True))
        if not distance < TOLERANCE:
            row.outcome, row.detail = WRONG, f"float32: logprobs differ by {distance:.2g}"
        for request, sequence, own in zip(requests, sequences, exact, strict=True):
            begin = len(request.prompt_ids)
            top = own[begin - 1 :].topk(2)
            clear = (top.values[:, 0] - top.values[:, 1] > TOLERANCE).tolist()
            if any(
                a != b and far for a, b, far in zip(sequence[begin:], top.indices[:, 0].tolist(), clear, strict=True)
            ):
                row.outcome, row.detail = WRONG, "float32: other tokens"
        return
    own = own_logprobs(folder, sequences, torch.bfloat16)
    noise, distance = _typical_distance(own, exact), _typical_distance(found, exact)
    row.distances[dtype] = distance / max(noise, 1e-9)
    if not distance <= BFLOAT16_RATIO * noise + 1e-3:
        row.outcome = WRONG
        row.detail = f"bfloat16: {distance:.2g} from float32, where the model's own pass is {noise:.2g}"


def _save(config: PretrainedConfig, folder: Path, seed: int) -> None:
    try:
        save_model(config, folder, seed)
    except ImportError:  # other parts of a composite need a package that is not installed
        save_model(config.get_text_config(decoder=True), folder, seed)


def own_logprobs(folder: str, sequences: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Logprobs (tokens - 1, vocabulary) of the model's own eager forward pass over each sequence."""
    config = AutoConfig.from_pretrained(folder)
    settings = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        model = auto_class(config).from_pretrained(folder, **settings)
    except ImportError:
        text_config = config.get_text_config(decoder=True)
        model = auto_class(text_config).from_pretrained(folder, config=text_config, **settings)
    model.eval()
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            for ids in sequences
        ]


def _table(tokens: list[TokenLogprob]) -> torch.Tensor:
    table = torch.full((len(tokens), VOCABULARY), float("nan"))
    for row, token in zip(table, tokens, strict=True):
        ids, logprobs = zip(*token.top, strict=True)
        row[torch.tensor(ids)] = torch.tensor(logprobs)
    return table


def _max_distance(found: torch.Tensor, own: torch.Tensor) -> float:
    # Logprobs far below the likeliest have rounding errors of their own size.
    return float(((found - own) / own.abs().clamp_min(10.0) * 10.0).abs().max())


def _typical_distance(found: list[torch.Tensor], own: list[torch.Tensor]) -> float:
    """The median over positions of the root mean square over the vocabulary: rounding may choose another expert at some
    positions, and then their logprobs are far apart."""
    by_position = torch.cat([(a - b).square().mean(dim=1).sqrt() for a, b in zip(found, own, strict=True)])
    return float(by_position.median())


def _forward_pass(info: EngineInfo) -> str:
    return "whole step" if any(part.kind == "whole_step" and part.fused for part in info.fused_layers) else "modules"


def _fused(info: EngineInfo) -> str:
    parts = [part.kind.replace("_", " ") for part in info.fused_layers if part.fused and part.kind != "whole_step"]
    return ", ".join(parts) or "none"


# ---- the table --------------------------------------------------------------------------------------------------


def all_names() -> list[str]:
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITES, *VARIANTS]


def table(rows: Iterable[Row]) -> str:
    """Markdown, a line for each architecture."""
    lines = ["| `model_type` | outcome | forward pass | fused |", "|---|---|---|---|"]
    order = {name: index for index, name in enumerate(all_names())}
    for row in sorted(rows, key=lambda row: order.get(row.name, len(order))):
        outcome = row.outcome if row.outcome == EXACT else f"{row.outcome}: {_short(row.detail)}"
        lines.append(f"| {row.name} | {outcome} | {row.forward_pass} | {row.fused} |")
    return "\n".join(lines)


def _short(detail: str) -> str:
    """A refusal's reason alone, without what differs from run to run."""
    reason = re.sub(r"^\S+ cannot be served: |^The (?=model in)", "", detail.splitlines()[-1])
    reason = re.sub(r"(?<=model in )\S+", "its folder", reason)
    reason = re.split(r", so its|, which the|; only| by [\d.e+-]+ standard|\. | \(It ", reason)[0]
    return reason.rstrip(".").replace("|", "\\|")


def write(rows: Iterable[Row]) -> None:
    """Replace the table in docs/models.md."""
    rows = list(rows)
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in (EXACT, REFUSED, WRONG, TRACEBACK)}
    text = DOC.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    made = f"transformers {transformers.__version__}, {len(rows)} architectures: {summary}.\n\n{table(rows)}"
    DOC.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}", encoding="utf-8")


def read_results(file: Path) -> dict[str, Row]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types; default: all")
    parser.add_argument("--results", type=Path, help="file to which each result is added as a line of JSON")
    parser.add_argument("--resume", action="store_true", help="skip what is in the file of results")
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = read_results(arguments.results) if arguments.results else {}
    names = arguments.only or all_names()
    for name in names:
        if arguments.resume and name in rows:
            continue
        row = rows[name] = check(name)
        print(f"{row.name}: {row.outcome} {row.detail} [{row.seconds:.1f} s, {row.distances}]", flush=True)
        if arguments.results:
            with arguments.results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
    found = [rows[name] for name in names]
    print(table(found))
    if arguments.write:
        write(found)
    if any(row.outcome in (WRONG, TRACEBACK) for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
