"""From settings to a core that is ready: load, probe, size the KV cache, verify, measure."""

from __future__ import annotations

import logging
import time

from fastserve.engine.contract import EngineInfo, FusedLayers, SamplingParams
from fastserve.engine.core import EngineCore, Executor
from fastserve.engine.devices import Spread
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.runner.loading import LoadedModel, failing_in_a_sentence, load_model
from fastserve.engine.runner.placement import find_placement
from fastserve.engine.runner.runner import ModelRunner, probe_shapes
from fastserve.engine.runner.streaming import Progress
from fastserve.engine.runner.twin import twin_differs
from fastserve.engine.runner.verify import verify
from fastserve.engine.settings import EngineConfig, WeightOptions
from fastserve.engine.sizing import Sizes, find_sizes
from fastserve.engine.speculation.controller import Controller
from fastserve.engine.speculation.draft_model import DraftingExecutor, DraftModel
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import OpenProposer, Speculator
from fastserve.engine.speculation.vocabulary import require_same_vocabulary
from fastserve.engine.speed import REFERENCE_BATCH, SpeedMeter
from fastserve.errors import StartupError

logger = logging.getLogger(__name__)


def build_core(config: EngineConfig, progress: Progress) -> EngineCore:
    """Load the model and make everything ready. Raises StartupError with a sentence for the person."""
    begin = time.perf_counter()
    if config.num_speculative_tokens < 1:
        raise StartupError(
            f"--num-speculative-tokens {config.num_speculative_tokens} must be at least 1; "
            "--speculative-method off turns speculation off."
        )
    spread = Spread(config.num_gpus, config.max_gpu_memory, config.cpu_offloading)
    loaded = _load(config, config.model_dir, progress, spread, config.weights)
    draft = _load_draft(config, loaded, progress)
    sizes = find_sizes(config, [loaded] if draft is None else [loaded, draft])
    num_blocks, max_model_len = sizes.num_blocks, sizes.max_model_len
    runner = _make_runner(config, loaded, sizes)
    speed = _measure(runner, num_blocks, config)
    executor: Executor = runner
    draft_model = None
    if draft is not None:
        draft_model = _make_draft_model(config, draft, sizes, _vocab_size(loaded))
        executor = DraftingExecutor(draft_model, runner)
    info = EngineInfo(
        model_path=config.model_dir,
        architecture=type(loaded.model).__name__,
        device=", ".join(map(str, loaded.devices)),
        dtype=str(loaded.dtype).removeprefix("torch."),
        vocab_size=_vocab_size(loaded),
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=loaded.eos_token_ids,
        num_parameters=loaded.weights.num_parameters,
        load_s=time.perf_counter() - begin,
        fused_layers=_fused_layers(loaded, runner),
    )
    for layers in info.fused_layers:
        logger.info("%s", layers)
    return EngineCore(
        info,
        executor,
        speed,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        prefix_cache=config.prefix_cache,
        speculator=_make_speculator(config, speed, draft_model),
        overlap=draft is None and _overlaps(config, loaded),
        weights=loaded.weights,
    )


def _load(
    config: EngineConfig, model_dir: str, progress: Progress, spread: Spread, weights: WeightOptions
) -> LoadedModel:
    loaded = load_model(
        model_dir,
        config.device,
        config.dtype,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
        find_places=lambda model, device: find_placement(
            model, device, spread, config.gpu_memory_utilization, weights.quantise
        ),
        options=weights,
    )
    if config.debug:
        logger.info("%s", loaded.model)
    name = type(loaded.model).__name__
    with failing_in_a_sentence(name):
        probe_shapes(loaded)
    if not loaded.attention.shapes:
        raise StartupError(f"{name} cannot be served: it has no attention that can be paged.")
    return loaded


def _load_draft(config: EngineConfig, loaded: LoadedModel, progress: Progress) -> LoadedModel | None:
    if config.speculative_model_dir is None:
        return None
    # A draft model is small, and pays by being fast: it stays whole.
    draft = _load(config, config.speculative_model_dir, progress, Spread(), WeightOptions())
    require_same_vocabulary(config.model_dir, config.speculative_model_dir, _vocab_size(loaded), _vocab_size(draft))
    return draft


def _overlaps(config: EngineConfig, loaded: LoadedModel) -> bool:
    return (loaded.device.type == "cuda" and loaded.placement is None) if config.overlap is None else config.overlap


def _vocab_size(loaded: LoadedModel) -> int:
    size: int = loaded.model.config.get_text_config(decoder=True).vocab_size
    return size


def _make_runner(config: EngineConfig, loaded: LoadedModel, sizes: Sizes, vocab_size: int | None = None) -> ModelRunner:
    """A runner that has shown that it computes what the model's own code does."""
    runner = ModelRunner(
        loaded,
        num_blocks=sizes.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        vocab_size=vocab_size,
    )
    name = type(loaded.model).__name__
    differs = None if runner.decoder is None else twin_differs(loaded.model.config)
    if differs is not None:
        runner.drop_decoder(differs)
    with failing_in_a_sentence(name):
        verify(
            loaded.reference,
            runner,
            name,
            loaded.dtype,
            block_size=config.block_size,
            num_blocks=sizes.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=min(sizes.max_model_len, loaded.context_length),
        )
    return runner


def _fused_layers(loaded: LoadedModel, runner: ModelRunner) -> tuple[FusedLayers, ...]:
    if loaded.device.type != "cpu":
        return loaded.fused_layers
    reason = runner.no_decoder_reason
    return (*loaded.fused_layers, FusedLayers("whole_step", 0 if reason else 1, 1, reason))


def _make_draft_model(config: EngineConfig, draft: LoadedModel, sizes: Sizes, vocab_size: int) -> DraftModel:
    runner = _make_runner(config, draft, sizes, vocab_size)
    return DraftModel(
        runner,
        _measure(runner, sizes.num_blocks, config),
        num_blocks=sizes.num_blocks,
        block_size=config.block_size,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        context_length=min(sizes.max_model_len, draft.context_length),
    )


def _make_speculator(config: EngineConfig, speed: SpeedMeter, draft_model: DraftModel | None) -> Speculator | None:
    most = config.num_speculative_tokens
    if draft_model is not None:
        return Speculator(OpenProposer(), Controller(speed.step_s, draft_model.step_s), most)
    if config.speculative_method == "ngram":
        return Speculator(NgramProposer(), Controller(speed.step_s), most)
    return None


def _measure(runner: ModelRunner, num_blocks: int, config: EngineConfig) -> SpeedMeter:
    """Time steps of one and of a few sequences' single tokens; also warms up what the first request would wait for."""
    most = max(1, min(2 * REFERENCE_BATCH, config.max_num_seqs, num_blocks))
    counts = sorted({1, min(REFERENCE_BATCH // 2, most), most})
    measured = [(count, _time_decode(runner, count)) for count in counts]
    if most == 1:
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
