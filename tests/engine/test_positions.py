"""What depends on positions: windows and chunks by a mask alone, scales by position, layers without rotary embedding,
sinks beside windows, and rotary embeddings that change with the length.

Each model runs through the real core beyond each boundary of its configuration, with chunked prefill, prefix hits and
drafts; its logits must be those of the model's own eager forward.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    SmolLM3Config,
)

from fastserve.engine.attention.masks import CausalMask, find_mask
from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, SamplingParams, TokenLogprob
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.loading.loader import prepare_positions
from fastserve.engine.settings import EngineConfig
from fastserve.engine.speculation.draft_budget import DraftBudget
from fastserve.engine.speculation.speculator import PlaceholderProposer, Speculator
from fastserve.errors import StartupError

from .conftest import SHAPE
from .test_decode_graphs import Rerun
from .triton_interpreter import import_kernels, triton_attention

VOCABULARY: int = SHAPE["vocab_size"]
BOUNDARY = 8
"""Windows, chunks and original lengths."""
MAX_TOKENS = 12
MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOUR_LAYERS = {**SHAPE, "num_hidden_layers": 4, "head_dim": 12}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SCALED = {
    "rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": BOUNDARY,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "chunks, NoPE layers scaled by position, experts": Llama4TextConfig(
        **FOUR_LAYERS, num_local_experts=2, num_experts_per_tok=2, intermediate_size_mlp=96,
        no_rope_layers=[1, 0, 1, 0], attention_chunk_size=BOUNDARY, floor_scale=BOUNDARY, attn_scale=0.5,
    ),
    "window by the mask of all layers": PhimoeConfig(**SHAPE, **MOE, sliding_window=BOUNDARY),
    "window by the mask of some layers": Qwen2MoeConfig(
        **FOUR_LAYERS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, use_sliding_window=True, sliding_window=BOUNDARY, layer_types=ALTERNATING,
    ),
    "all queries scaled by position": Ministral3Config(**SHAPE, head_dim=12, rope_parameters=SCALED),
    "rotary embedding by layer type": Gemma3TextConfig(
        **FOUR_LAYERS, query_pre_attn_scalar=12, sliding_window=BOUNDARY, layer_types=ALTERNATING,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "NoPE layers": SmolLM3Config(**FOUR_LAYERS, no_rope_layers=[1, 0, 1, 1]),
    "NoPE layers with windows": SmolLM3Config(
        **FOUR_LAYERS, no_rope_layers=[1, 0, 1, 1], use_sliding_window=True, sliding_window=BOUNDARY
    ),
    "rotary embedding on window layers only": Cohere2Config(
        **FOUR_LAYERS, sliding_window=BOUNDARY, layer_types=ALTERNATING
    ),
    "rotary embedding on window layers only, norms after": Exaone4Config(
        **FOUR_LAYERS, sliding_window=BOUNDARY, layer_types=ALTERNATING
    ),
    "sinks beside windows": GptOssConfig(**FOUR_LAYERS, **MOE, sliding_window=BOUNDARY, layer_types=ALTERNATING),
}  # fmt: skip


class KnownAnswers:
    """Drafts what an earlier run has answered, with a wrong token now and then."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = [list(sequence) for sequence in sequences]
        self._rng = random.Random(0)

    def propose(self, seq_id: int, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        length = len(token_ids)
        known = next((known for known in self._sequences if known[:length] == list(token_ids)), [])
        drafts = known[length : length + max_drafts]
        return [token if self._rng.random() < 0.8 else (token + 1) % VOCABULARY for token in drafts]

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


def save(config: PretrainedConfig, folder: Path) -> str:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Those initialised to zeros or ones must matter too.
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return str(folder)


def start(path: str, dtype: str = "float32", **settings: Any) -> EngineCore:
    sizes: dict[str, Any] = {"max_num_batched_tokens": 23, "max_total_tokens": 512, "max_num_seqs": 6, **settings}
    return build_core(EngineConfig(model_dir=path, device="cpu", dtype=dtype, **sizes), lambda *_: None)


def requests_for(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> list[EngineRequest]:
    """Prompts that begin alike. All logits are asked for, as logprobs."""
    rng = random.Random(5)
    shared = [rng.randrange(2, VOCABULARY) for _ in range(max(lengths))]
    params = SamplingParams(max_tokens, temperature=0.0, logprobs=VOCABULARY)
    return [
        EngineRequest(f"r{index}", [*shared[: length - 2], index + 2, index + 9][-length:], params)
        for index, length in enumerate(lengths)
    ]


def run(core: EngineCore, requests: Sequence[EngineRequest]) -> dict[str, list[TokenLogprob]]:
    """Logprobs of each request's tokens."""
    found: dict[str, list[TokenLogprob]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert core.add(request) is None
    while core.has_work:
        for output in core.step():
            assert output.error is None
            found[output.request_id] += output.logprobs or []
        core.scheduler.check()
    return found


def run_with_drafts(
    core: EngineCore, requests: Sequence[EngineRequest], known: dict[str, list[TokenLogprob]]
) -> dict[str, list[TokenLogprob]]:
    """With the known answers as drafts, most of which are right."""
    texts = [request.prompt_ids + [token.token_id for token in known[request.request_id]] for request in requests]
    core._speculator = core.scheduler._drafting = Speculator(KnownAnswers(texts), DraftBudget(lambda _: 1.0), 5)
    found = run(core, requests)
    assert core.stats.accepted_tokens > 0
    return found


def assert_equals_own_forward(path: str, requests: Sequence[EngineRequest], dtype: str, switch: int | None) -> None:
    """In float32 without drafts, with prefix hits and with drafts; in bfloat16, if asked for, with drafts."""
    own = Own(path)
    core = start(path)
    core._speculator = core.scheduler._drafting = None
    answers = [run(core, requests), run(core, requests)]
    assert core.scheduler.cached_tokens > 0
    answers.append(run_with_drafts(core, requests, answers[0]))
    assert core.scheduler.preemptions == 0
    for found in answers:
        assert distance(own, requests, found, torch.float32, switch)[0] < 2e-3
    if dtype == "bfloat16":
        found = run_with_drafts(start(path, "bfloat16"), requests, answers[0])
        worst, noise = distance(own, requests, found, torch.bfloat16, switch)
        assert worst < 2 * noise


class Own:
    """The model's own eager forward, in each dtype."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._models: dict[torch.dtype, PreTrainedModel] = {}

    def logprobs(self, token_ids: list[int], dtype: torch.dtype, switch: int | None = None) -> torch.Tensor:
        """(tokens, vocabulary) after each prefix, computed as a sequence of its own length: `switch` is the length
        beyond which all positions have other rotary frequencies."""
        if dtype not in self._models:
            load = AutoModelForCausalLM.from_pretrained
            self._models[dtype] = load(self._path, dtype=dtype, attn_implementation="eager").eval()

        def forward(ids: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                logits = self._models[dtype](input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            return logits.float().log_softmax(dim=-1)

        whole = forward(token_ids)
        if switch is None or len(token_ids) <= switch:
            return whole
        return torch.cat([forward(token_ids[:switch]), whole[switch:]])


def distance(
    own: Own,
    requests: Sequence[EngineRequest],
    found: dict[str, list[TokenLogprob]],
    dtype: torch.dtype,
    switch: int | None = None,
) -> tuple[float, float]:
    """Largest difference of a logprob from the model's own, and of the model's own in `dtype` from float32."""
    worst = noise = 0.0
    for request in requests:
        answer, count = found[request.request_id], request.params.max_tokens
        assert len(answer) == count
        first = len(request.prompt_ids) - 1
        token_ids = request.prompt_ids + [token.token_id for token in answer]
        expected, exact = (own.logprobs(token_ids, kind, switch) for kind in (dtype, torch.float32))
        engine = torch.full((count, VOCABULARY), math.nan)
        for row, token in enumerate(answer):
            for token_id, logprob in token.top:
                engine[row, token_id] = logprob
            assert token.logprob == max(logprob for _, logprob in token.top)
        difference = (engine - expected[first : first + count]).abs().max()
        worst = max(worst, float(difference))
        noise = max(noise, float((expected - exact)[first : first + count].abs().max()))
    assert not math.isnan(worst)
    return worst, noise


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.3, 1.0, 2.0, 1.7, 1.1, 1.2],
    "long_factor": [4.0, 1.0, 7.0, 3.0, 2.0, 9.0], "original_max_position_embeddings": 2 * BOUNDARY,
}  # fmt: skip
SWITCHING: dict[str, PretrainedConfig] = {
    "phi3": Phi3Config(**SHAPE, rope_parameters=LONGROPE, original_max_position_embeddings=2 * BOUNDARY),
    "phimoe": PhimoeConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=2,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
        original_max_position_embeddings=2 * BOUNDARY,
    ),
    "llama": LlamaConfig(**SHAPE, rope_parameters={**LONGROPE, "factor": 16.0}),
}  # fmt: skip
LENGTHS = (1, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, 2 * BOUNDARY, 40)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_depends_on_positions_equals_the_models_own(name: str, tmp_path: Path) -> None:
    assert_equals_own_forward(save(CONFIGS[name], tmp_path), requests_for(LENGTHS), "bfloat16", None)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096])
def test_masks_are_read_from_the_rule_that_makes_them(size: int) -> None:
    def in_window(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - size)

    def in_chunk(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key // size == query // size)

    def causal(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= query

    def with_first_tokens(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return in_window(batch, head, query, key) | ((key < 4) & (key <= query))

    def in_both_directions(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= 0

    assert find_mask(in_window, size) == CausalMask(window=size)
    assert find_mask(in_chunk, size) == (CausalMask(chunk=size) if size > 1 else CausalMask(window=1))
    assert find_mask(causal, None) == find_mask(causal, size) == CausalMask()
    assert find_mask(with_first_tokens, size) is None
    assert find_mask(in_both_directions, None) is None
    assert find_mask(in_window, None) is None


def test_inputs_of_the_observed_tokens_are_those_of_any_text() -> None:
    """Models of images and text OR a rule of their own with the causal one, which looks up the image of each token."""

    def causal_or_same(groups: torch.Tensor, among: int | None = None) -> Any:
        def rule(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            same = (groups[batch, query] == groups[batch, key]) & (groups[batch, query] >= 0)
            causal = key <= query
            return causal | same if among is None else (causal | same) & (key > query - among)

        return rule

    text = torch.full((1, 5), -1)
    assert find_mask(causal_or_same(text), None) == find_mask(causal_or_same(text[:, :1]), None) == CausalMask()
    assert find_mask(causal_or_same(text, among=8), 8) == CausalMask(window=8)
    one_image = torch.zeros(1, 5, dtype=torch.long)
    some_of_each = torch.tensor([[-1, -1, 0, 0, -1]])
    assert find_mask(causal_or_same(one_image), None) is None
    assert find_mask(causal_or_same(some_of_each), None) is None

    def of_observed_positions(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(5)
        return positions[key] <= positions[query]

    assert find_mask(of_observed_positions, None) is None


def test_a_mask_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    path = save(LlamaConfig(**SHAPE, is_causal=False), tmp_path)
    with pytest.raises(StartupError, match=r"LlamaForCausalLM cannot be served: the mask .* is neither causal nor"):
        start(path)


@pytest.mark.parametrize("name", list(SWITCHING))
def test_rope_that_switches_with_the_length_equals_the_models_own_at_each_length(name: str, tmp_path: Path) -> None:
    """Sequences that stay short, cross the length and begin beyond it, in the same batches and with common prefixes."""
    path = save(SWITCHING[name], tmp_path)
    assert start(path).info.max_model_len == SHAPE["max_position_embeddings"]
    requests = requests_for((1, 4, 2 * BOUNDARY - MAX_TOKENS, 15, 16, 17, 40))
    # In bfloat16, rounding changes which experts a token goes to.
    assert_equals_own_forward(path, requests, "float32" if name == "phimoe" else "bfloat16", 2 * BOUNDARY)


def test_a_draft_model_follows_the_switch(tmp_path: Path) -> None:
    path = save(SWITCHING["phi3"], tmp_path)
    requests = requests_for((4, 2 * BOUNDARY - 5, 40))
    core = start(path, speculative_model_dir=path)
    core._speculator = core.scheduler._drafting = Speculator(PlaceholderProposer(), DraftBudget(lambda _: 1.0), 5)
    worst, _ = distance(Own(path), requests, run(core, requests), torch.float32, switch=2 * BOUNDARY)
    assert worst < 2e-3
    assert core.stats.accepted_tokens > 0.8 * core.stats.draft_tokens > 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for a GPU here")
@pytest.mark.parametrize("name", ["switch", pytest.param("chunks", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("no_start_check")
def test_recorded_steps_know_positions_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: with the same kernels, interpreted, and a stand-in for its graphs."""
    kernels: Any = import_kernels("triton_attention")
    recorder = Rerun()
    monkeypatch.setattr(CpuDevice, "attention_backend", triton_attention)
    monkeypatch.setattr(CpuDevice, "graph_recorder", lambda self: recorder)
    monkeypatch.setattr(kernels, "_MIN_SPLITS", 1)  # with such short contexts most splits would be empty
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 12}
    if name == "switch":
        rope = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2 * BOUNDARY}
        path = save(Phi3Config(**{**SHAPE, **sizes, "num_hidden_layers": 1}, **rope), tmp_path)
    else:
        path = save(
            Llama4TextConfig(
                **{**SHAPE, **sizes}, moe_layers=[], intermediate_size_mlp=96, no_rope_layers=[1, 0],
                attention_chunk_size=BOUNDARY, floor_scale=BOUNDARY, attn_scale=0.5,
            ),
            tmp_path,
        )  # fmt: skip
    core = start(path, max_num_seqs=2, max_model_len=32, max_total_tokens=64, speculative_method="off")
    recorder.replays = 0
    requests = requests_for((2 * BOUNDARY - 2, 3), max_tokens=4)
    switch = 2 * BOUNDARY if name == "switch" else None
    worst, _ = distance(Own(path), requests, run(core, requests), torch.float32, switch)
    assert worst < 2e-3
    assert recorder.replays > 0


def test_each_row_of_the_models_own_forward_has_its_own_positions(tmp_path: Path) -> None:
    """The start check computes sequences at near and far positions in one batch, by the model's own code."""
    for name in ("phi3", "llama4"):
        config = SWITCHING[name] if name in SWITCHING else CONFIGS["chunks, NoPE layers scaled by position, experts"]
        path = save(config, tmp_path / name)
        attention = PagedAttention(attention_backend)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        prepare_positions(model, attention)
        ids = torch.arange(2, 14).view(3, 4)
        positions = torch.tensor([[0], [2 * BOUNDARY - 2], [100]]) + torch.arange(4)
        with torch.inference_mode():
            together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            alone = [
                model(input_ids=ids[row : row + 1], position_ids=positions[row : row + 1], use_cache=False).logits
                for row in range(3)
            ]
            near = model(input_ids=ids, use_cache=False).logits
        assert (together - torch.cat(alone)).abs().max() < 1e-4
        assert (together[0] - near[0]).abs().max() < 1e-4
        assert (together[1:] - near[1:]).abs().amax(dim=(1, 2)).min() > 1e-2
