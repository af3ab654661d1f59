"""From settings to a core that is ready: load, probe, size the KV cache, verify, measure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from llguidance import LLTokenizer

from fastserve.config import EngineOptions
from fastserve.engine.adapters.deltas import attach
from fastserve.engine.adapters.manager import AdapterManager
from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.adapters.reading import AdapterReader
from fastserve.engine.adapters.sites import find_sites
from fastserve.engine.adapters.store import DeviceStore
from fastserve.engine.attention.backend import KVCache
from fastserve.engine.calls.handling import Weights
from fastserve.engine.contract import EngineInfo, FusedLayers, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.find import device_of
from fastserve.engine.executor import Executor
from fastserve.engine.grammars import GrammarStore
from fastserve.engine.kv_cache import BlockPool
from fastserve.engine.loading.loader import LoadedModel, failing_in_a_sentence, load_model
from fastserve.engine.loading.placement import find_placement
from fastserve.engine.loading.streaming import Progress
from fastserve.engine.model_memory import ModelMemory
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.ranks.collectives import SINGLE_RANK, Collectives
from fastserve.engine.ranks.executor import RankedExecutor, RankedWeights, Send
from fastserve.engine.ranks.step_deadline import StepDeadline
from fastserve.engine.runner.forward.modules import ModulesForward
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.sampling.grammar import Grammar
from fastserve.engine.sampling.order import LOGITS_PROCESSORS, needs_last_token
from fastserve.engine.sampling.processor import LogitsProcessor
from fastserve.engine.scheduling import check as check_policy
from fastserve.engine.scheduling import load as load_policy
from fastserve.engine.selfcheck.compare import Capacity
from fastserve.engine.selfcheck.verify import check_model
from fastserve.engine.settings import AdapterOptions, EngineConfig, WeightOptions
from fastserve.engine.sizing import Sizes, find_sizes
from fastserve.engine.speculation.draft_budget import DraftBudget
from fastserve.engine.speculation.draft_model import DraftingExecutor, DraftModel
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import PlaceholderProposer, Speculator
from fastserve.engine.speculation.vocabulary import require_same_vocabulary
from fastserve.engine.speed import REFERENCE_BATCH, SpeedMeter
from fastserve.engine.spread import Spread, read_gpu_memory
from fastserve.engine.updating import WeightReceiver
from fastserve.engine.weight_updates.checker import Checker
from fastserve.engine.weight_updates.ranked import RankedReceiver
from fastserve.engine.weight_updates.receiver import LocalReceiver
from fastserve.engine.weight_updates.staging import WeightNames
from fastserve.errors import StartupError
from fastserve.options import check_ranges
from fastserve.text.grammar_tokenizer import grammar_tokenizer, parser_limits, require_grammars
from fastserve.text.load_tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_SMALL_UPDATE_BYTES = 16 << 20
_DRAFT_MODEL_STAYS = (
    "The draft model keeps its weights: the further the updated model moves away from it, the fewer of its drafts are "
    "accepted."
)
_TRANSFER_BYTES = 128 << 20
"""Memory that a weight update takes beside the copy of the weights."""


@dataclass(frozen=True, slots=True)
class RankModel:
    """One rank's part of a model, with its runner and sizes."""

    loaded: LoadedModel
    draft: LoadedModel | None
    """On rank 0 alone, and whole: a draft model is small."""
    sizes: Sizes
    runner: ModelRunner
    speed: SpeedMeter
    names: WeightNames
    receiver: LocalReceiver
    """Receives the rank's part of new weights."""

    @property
    def may_compile(self) -> bool:
        """Whether a step may compile kernels."""
        return any(device_of(device).compiles_in_steps for device in self.loaded.devices)


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """One rank's part of a model, and what other models it needs."""

    loaded: LoadedModel
    draft: LoadedModel | None
    """On rank 0 alone, and whole: a draft model is small."""


LoadRank = Callable[[EngineConfig, Progress, Collectives], LoadedRank]


def load_rank(config: EngineConfig, progress: Progress, collectives: Collectives) -> LoadedRank:
    """Load one rank's part of the model, side by side with the other ranks. Raises StartupError with a message for the
    user."""
    check_ranges(EngineOptions, config)
    max_gpu_memory = None if config.max_gpu_memory is None else read_gpu_memory(config.max_gpu_memory)
    spread = Spread(config.num_gpus, max_gpu_memory, config.cpu_offloading)
    loaded = _load(
        config,
        config.model_dir,
        progress,
        spread,
        config.weights,
        collectives,
        has_adapters=config.adapters is not None,
    )
    return LoadedRank(loaded, _load_draft(config, loaded, progress) if collectives.rank == 0 else None)


def build_rank(
    config: EngineConfig,
    progress: Progress,
    processors: Sequence[LogitsProcessor],
    collectives: Collectives,
    load: LoadRank = load_rank,
) -> RankModel:
    """Load one rank's part of the model and verify it, side by side with the other ranks. `load`: for a rank that may
    have its weights already. Raises StartupError with a message for the user."""
    rank = load(config, progress, collectives)
    loaded, draft = rank.loaded, rank.draft
    collectives.barrier()  # all have loaded, so that free memory is what they share
    sizes = find_sizes(config, [loaded] if draft is None else [loaded, draft], config.num_local_ranks)
    sizes = _smallest(sizes, collectives)
    make_adapter_memory = None
    if config.adapters is not None:
        more = -(-config.adapters.pool_size_lora // config.block_size)
        sizes = replace(sizes, num_blocks=sizes.num_blocks + more)
        make_adapter_memory = partial(_make_adapter_memory, config.adapters, loaded, sizes.num_blocks, collectives)
    runner = _make_runner(
        config, loaded, sizes, processors, make_adapter_memory=make_adapter_memory, collectives=collectives
    )
    speed = _measure(runner, sizes.num_blocks, config)
    names = WeightNames(loaded.weights, loaded.conversion, loaded.model, is_divided=collectives.size > 1)
    receiver = _make_receiver(config, loaded, names, collectives, has_draft_model=draft is not None)
    return RankModel(loaded, draft, sizes, runner, speed, names, receiver)


def _smallest(sizes: Sizes, collectives: Collectives) -> Sizes:
    """The sizes that fit all ranks."""
    negative = -torch.tensor([sizes.max_model_len, sizes.num_blocks, sizes.max_num_batched_tokens])
    max_model_len, num_blocks, max_num_batched_tokens = (-collectives.all_reduce_max(negative)).tolist()
    return Sizes(max_model_len, num_blocks, max_num_batched_tokens)


def build_core(
    config: EngineConfig,
    progress: Progress,
    processors: Sequence[LogitsProcessor] = LOGITS_PROCESSORS,
    *,
    collectives: Collectives = SINGLE_RANK,
    send_to_ranks: Send | None = None,
    load: LoadRank = load_rank,
) -> EngineCore:
    """Load the model and make everything ready. Raises StartupError with a message for the user.

    `processors` are applied in their order. `collectives`: of the ranks that the model is divided over; this is rank 0.
    `send_to_ranks`: sends commands to the others, if there are any. `load`: see `build_rank`.
    """
    begin = time.perf_counter()
    adapters = () if config.adapters is None else [name for name, _ in config.adapters.modules]
    check_policy(config, adapters)
    grammars = None
    if config.tokenizer_dir is not None:
        grammars = GrammarStore(parser_limits(config.max_grammar_fuel), config.max_cached_grammar_bytes)
        processors = (*processors, Grammar(grammars))
    model = build_rank(config, progress, processors, collectives, load)
    loaded, sizes, runner, speed = model.loaded, model.sizes, model.runner, model.speed
    policy = load_policy(config, adapters, max_num_batched_tokens=sizes.max_num_batched_tokens)
    executor: Executor = runner
    weights: Weights = loaded.weights
    receiver: WeightReceiver = model.receiver
    if send_to_ranks is not None:
        executor = RankedExecutor(runner, send_to_ranks, StepDeadline(collectives, may_compile=model.may_compile))
        weights = RankedWeights(weights, send_to_ranks)
        receiver = RankedReceiver(model.receiver, send_to_ranks, collectives)
    if grammars is not None:
        grammars.load = partial(_load_grammar_tokenizer, config, _vocab_size(loaded), loaded.eos_token_ids)
    draft_model = None
    if model.draft is not None:
        draft_model = _make_draft_model(config, model.draft, sizes, processors, loaded)
        executor = DraftingExecutor(draft_model, executor)
    info = EngineInfo(
        architecture=type(loaded.model).__name__,
        device=", ".join(map(str, loaded.devices)),
        dtype=str(loaded.dtype).removeprefix("torch."),
        vocab_size=_vocab_size(loaded),
        max_model_len=sizes.max_model_len,
        block_size=config.block_size,
        num_blocks=sizes.num_blocks,
        eos_token_ids=loaded.eos_token_ids,
        num_parameters=loaded.weights.num_parameters,
        load_s=time.perf_counter() - begin,
        num_ranks=collectives.size,
        fused_layers=_fused_layers(loaded, runner),
    )
    for layers in info.fused_layers:
        logger.info("%s", layers)
    return EngineCore(
        info,
        executor,
        speed,
        policy=policy,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        prefix_cache=not config.no_prefix_cache,
        needs_last_token=partial(needs_last_token, processors),
        rope_switch_length=loaded.rope_switch_length,
        speculator=_make_speculator(config, speed, draft_model),
        overlap=model.draft is None and send_to_ranks is None and _overlaps(loaded),
        weights=weights,
        make_adapters=_adapters_maker(config, loaded, runner, send_to_ranks),
        grammars=grammars,
        receiver=receiver,
        checker=Checker(weights, model.names),
        memory=_memory(config, loaded),
        model_dir=config.model_dir,
    )


def _load_grammar_tokenizer(config: EngineConfig, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer that grammars are compiled for. Raises UnsupportedCapabilityError if there can be none."""
    tokenizer = load_tokenizer(
        Path(config.tokenizer_dir or config.model_dir), trust_remote_code=config.trust_remote_code
    )
    end_token_ids = [token_id for token_id in (*eos_token_ids, *tokenizer.eos_token_ids) if token_id < vocab_size]
    require_grammars(tokenizer, end_token_ids)
    return grammar_tokenizer(tokenizer, vocab_size, list(dict.fromkeys(end_token_ids)))


def _make_receiver(
    config: EngineConfig,
    loaded: LoadedModel,
    names: WeightNames,
    collectives: Collectives,
    *,
    has_draft_model: bool,
) -> LocalReceiver:
    device = device_of(loaded.device)

    def has_room(num_bytes: int) -> bool:
        # Measuring free memory takes as long as a small update.
        return num_bytes <= _SMALL_UPDATE_BYTES or num_bytes + _TRANSFER_BYTES <= device.free_memory().num_bytes

    return LocalReceiver(
        names,
        loaded.device,
        has_room=has_room,
        rank=collectives.rank,
        fixed=_why_fixed(config, loaded),
        note=_DRAFT_MODEL_STAYS if has_draft_model else None,
    )


def _memory(config: EngineConfig, loaded: LoadedModel) -> ModelMemory:
    ranks = "leave out --tp-size: the memory of several ranks is not released." if config.tp_size > 1 else None
    adapters = "adapters are in the KV cache's memory." if config.adapters is not None else None
    return ModelMemory(
        loaded.attention.caches(),
        loaded.weights,
        {"kv_cache": ranks or adapters, "weights": ranks or _why_fixed(config, loaded)},
    )


def _why_fixed(config: EngineConfig, loaded: LoadedModel) -> str | None:
    """Why the weights of this model cannot be replaced while it serves; None: they can."""
    if loaded.stored_format is not None:
        return (
            f"The weights of this worker are those of a {loaded.stored_format} checkpoint, which cannot be replaced "
            "while it serves: start it with the unquantized checkpoint, and with --load-8bit or --load-4bit to have "
            "its weights quantized anew with each update."
        )
    if config.tp_size > 1 and config.weights.quantize is not None:
        return (
            "Weights that are quantized while they are loaded cannot be replaced where they are divided over ranks: "
            "leave out --load-8bit and --load-4bit, or --tp-size."
        )
    return None


def _load(
    config: EngineConfig,
    model_dir: str,
    progress: Progress,
    spread: Spread,
    weights: WeightOptions,
    collectives: Collectives = SINGLE_RANK,
    *,
    has_adapters: bool = False,
) -> LoadedModel:
    loaded = load_model(
        model_dir,
        config.device,
        config.dtype,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
        find_places=lambda model, device: find_placement(
            model, device, spread, config.gpu_memory_utilization, weights.quantize
        ),
        options=weights,
        collectives=collectives,
        expert_parallel=config.enable_expert_parallel,
        has_adapters=has_adapters,
    )
    if config.debug:
        logger.info("%s", loaded.model)
    name = type(loaded.model).__name__
    if not loaded.attention.shapes:
        raise StartupError(f"{name} cannot be served: it has no attention that can be paged.")
    return loaded


def _make_adapter_memory(
    options: AdapterOptions, loaded: LoadedModel, num_blocks: int, collectives: Collectives, caches: Sequence[KVCache]
) -> AdapterMemory:
    """The memory of adapters beside the KV cache, attached to the model's layers."""
    if loaded.placement is not None or loaded.adapter_targets is None:
        raise StartupError(
            "Adapters are served where a model, or each of its ranks, is on one device: leave out the adapters' flags, "
            "or --num-gpus and --cpu-offloading."
        )
    memory = AdapterMemory(
        find_sites(loaded.model, loaded.adapter_targets, collectives.rank),
        caches,
        loaded.dtype,
        loaded.device,
        num_slots=1 + min(num_blocks, max(options.max_loras, options.max_cpu_loras)),
        shares_blocks=not options.no_mem_pool,
        smallest=lambda values: (-collectives.all_reduce_max(-torch.tensor(values))).tolist(),
        computes=not options.no_lora_compute,
        pads_ranks=options.bmm,
    )
    attach(loaded.model, memory)
    return memory


def _adapters_maker(
    config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, send_to_ranks: Send | None
) -> Callable[[BlockPool], AdapterManager] | None:
    memory, targets = runner.adapter_memory, loaded.adapter_targets
    if config.adapters is None or memory is None or targets is None:
        return None
    reader = AdapterReader(
        {site.path: site for site in memory.sites},
        targets,
        loaded.dtype,
        width=memory.width,
        tiles_per_block=memory.tiles_per_block,
        max_rank=config.adapters.max_lora_rank,
        pins_memory=device_of(loaded.device).pins_memory,
        order=memory.order,
    )
    return partial(AdapterManager, DeviceStore(reader, memory, send_to_ranks), config.adapters)


def _load_draft(config: EngineConfig, loaded: LoadedModel, progress: Progress) -> LoadedModel | None:
    if config.speculative_model_dir is None:
        return None
    # A draft model is small and must be fast: it stays on one device.
    weights = WeightOptions(gguf_file=config.speculative_gguf_file)
    draft = _load(config, config.speculative_model_dir, progress, Spread(), weights)
    require_same_vocabulary(config.model_dir, config.speculative_model_dir, _vocab_size(loaded), _vocab_size(draft))
    return draft


def _overlaps(loaded: LoadedModel) -> bool:
    """Whether a step is planned while the last one runs. On a CPU the step itself needs the cores."""
    return device_of(loaded.device).runs_ahead and loaded.placement is None


def _vocab_size(loaded: LoadedModel) -> int:
    size: int = loaded.model.config.get_text_config(decoder=True).vocab_size
    return size


def _make_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    sizes: Sizes,
    processors: Sequence[LogitsProcessor],
    vocab_size: int | None = None,
    make_adapter_memory: Callable[[Sequence[KVCache]], AdapterMemory] | None = None,
    collectives: Collectives = SINGLE_RANK,
) -> ModelRunner:
    """A runner whose logits have been compared with those of the model's own code."""
    runner = ModelRunner(
        loaded,
        num_blocks=sizes.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        vocab_size=vocab_size,
        processors=processors,
        make_adapter_memory=make_adapter_memory,
    )
    name = type(loaded.model).__name__
    capacity = Capacity(
        config.block_size,
        sizes.num_blocks,
        config.max_num_seqs,
        min(sizes.max_model_len, loaded.context_length),
    )
    with failing_in_a_sentence(name):
        check_model(loaded, runner, capacity, collectives)
    return runner


def _fused_layers(loaded: LoadedModel, runner: ModelRunner) -> tuple[FusedLayers, ...]:
    """Fused and unfused layers by kind, then the ways to compute a whole step that this kind of device has."""
    ways = runner.forward_passes
    found = [FusedLayers(way.name, 1, 1) for way in ways.ways if way.name != ModulesForward.name]
    refused = [FusedLayers(name, 0, 1, reason) for name, reason in ways.refusals.items() if name not in ways.absent]
    return (*loaded.fused_layers, *found, *refused)


def _make_draft_model(
    config: EngineConfig, draft: LoadedModel, sizes: Sizes, processors: Sequence[LogitsProcessor], loaded: LoadedModel
) -> DraftModel:
    runner = _make_runner(config, draft, sizes, processors, _vocab_size(loaded))
    # Sequences are computed anew where the model's own rotary frequencies change, not where the draft model's do.
    switches_alone = draft.rope_switch_length not in (None, loaded.rope_switch_length)
    longest = draft.rope_switch_length if switches_alone else draft.context_length
    return DraftModel(
        runner,
        _measure(runner, sizes.num_blocks, config),
        num_blocks=sizes.num_blocks,
        block_size=config.block_size,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        context_length=min(sizes.max_model_len, longest or draft.context_length),
    )


def _make_speculator(config: EngineConfig, speed: SpeedMeter, draft_model: DraftModel | None) -> Speculator | None:
    num_speculative_tokens = config.num_speculative_tokens
    if draft_model is not None:
        return Speculator(PlaceholderProposer(), DraftBudget(speed.step_s, draft_model.step_s), num_speculative_tokens)
    if config.speculative_method == "ngram":
        return Speculator(NgramProposer(), DraftBudget(speed.step_s), num_speculative_tokens)
    return None


def _measure(runner: ModelRunner, num_blocks: int, config: EngineConfig) -> SpeedMeter:
    """Time decode steps of one sequence and of a few; also warms up what the first request would wait for."""
    max_count = max(1, min(2 * REFERENCE_BATCH, config.max_num_seqs, num_blocks))
    counts = sorted({1, min(REFERENCE_BATCH // 2, max_count), max_count})
    measured = [(count, _time_decode(runner, count)) for count in counts]
    if max_count == 1:
        measured.append((2, 2 * measured[0][1]))
    return SpeedMeter(*measured)


def _time_decode(runner: ModelRunner, count: int, repeats: int = 3) -> float:
    params = SamplingParams(max_tokens=1)
    times = []
    for _ in range(repeats):
        new = [NewSequence(i, [0], 1, params, 0) for i in range(count)]
        chunks = [Chunk(i, 0, 1, [i], sample=True) for i in range(count)]
        begin = time.perf_counter()
        runner.execute(StepPlan([], new, chunks))
        times.append(time.perf_counter() - begin)
        runner.forget(list(range(count)))
    return min(times)
