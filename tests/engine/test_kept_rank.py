"""A rank that is lost is replaced by one that loads by itself; others keep their weights. Ranks are threads here."""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastserve.engine.adapters.tiles import PLAIN
from fastserve.engine.build import RankModel, build_rank, load_rank
from fastserve.engine.contract import SamplingParams
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.kept_rank import KeptRank
from fastserve.engine.layers.parallel import VocabParallelEmbedding
from fastserve.engine.plan import Chunk, NewSequence, StepPlan
from fastserve.engine.ranks.collectives import SingleRank
from fastserve.engine.ranks.exchange_record import ExchangeRecord
from fastserve.engine.ranks.segment import Segment
from fastserve.engine.ranks.shared_memory import SharedMemoryCollectives
from fastserve.engine.runner.forward.find import ForwardPasses
from fastserve.engine.runner.forward.forward_pass import ForwardParts, UnsupportedError
from fastserve.engine.runner.forward.whole_step import WholeStepForward
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.settings import AdapterOptions, EngineConfig, WeightOptions
from fastserve.errors import StartupError

from .conftest import TinyModels


class Ranks:
    """The ranks of a model, in one group after the other."""

    def __init__(self, config: EngineConfig, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.loads: list[int] = []
        """Ranks that have loaded, in order."""

        def counted(config: EngineConfig, progress: Any, collectives: Any) -> Any:
            self.loads.append(collectives.rank)
            return load_rank(config, progress, collectives)

        monkeypatch.setattr("fastserve.engine.kept_rank.load_rank", counted)
        self.kept = [KeptRank() for _ in range(size)]
        self.models: list[RankModel] = []
        self.form()

    def form(self) -> None:
        segment = Segment.create(len(self.kept))

        def enter(rank: int) -> RankModel:
            joined = SharedMemoryCollectives.load(segment, rank, 30.0)
            if joined is None:
                pytest.skip("no C++ compiler")
            collectives = self.kept[rank].enter(joined)
            return build_rank(self.config, lambda *_: None, LOGITS_PROCESSORS, collectives, self.kept[rank].load)

        with ThreadPoolExecutor(len(self.kept)) as pool:
            self.models = list(pool.map(enter, range(len(self.kept))))

    def lose(self, *ranks: int) -> None:
        self.models.clear()
        for rank, kept in enumerate(self.kept):
            if rank in ranks:
                self.kept[rank] = KeptRank()
            else:
                kept.leave()
        self.loads.clear()

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of the last token, which are the same on all ranks."""
        count = len(token_ids)
        plan = StepPlan([], [NewSequence(0, list(token_ids), count, SamplingParams(1, temperature=0.0), 0)], [])
        plan.chunks.append(Chunk(0, 0, count, list(range(-(-count // 16))), sample=True))

        def forward(model: RankModel) -> torch.Tensor:
            found = model.runner.forward(plan).clone()
            model.runner.forget([0])
            return found

        with ThreadPoolExecutor(len(self.models)) as pool:
            first, *others = pool.map(forward, self.models)
        assert all(torch.equal(first, other) for other in others)
        return first

    def references(self) -> list[torch.Tensor]:
        return [model.loaded.reference.logits for model in self.models]


def tiny(path: str, **settings: Any) -> EngineConfig:
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_total_tokens": 160, "tp_size": 2} | settings
    return EngineConfig(model_dir=path, **values)


PROMPT = [5, 9, 70, 31, 2, 2, 8, 100, 44]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"weights": WeightOptions(quantize="int8"), "adapters": AdapterOptions(max_loras=2)}),
        ("qwen3", {}),
        ("mixtral", {}),
    ],
)
def test_only_the_lost_rank_loads_and_answers_stay_the_same(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    ranks = Ranks(tiny(tiny_models.path(name), **settings), 2, monkeypatch)
    before, references = ranks.logits(PROMPT), ranks.references()
    for lost in (1, 0):
        ranks.lose(lost)
        ranks.form()
        assert ranks.loads == [lost]
        assert torch.equal(ranks.logits(PROMPT), before)
        assert all(torch.equal(*pair) for pair in zip(ranks.references(), references, strict=True))


def test_a_group_without_weights_loads_as_at_first(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tiny(tiny_models.path("llama")), 2, monkeypatch)
    before = ranks.logits(PROMPT)
    for lost in ((0, 1), (1,)):
        ranks.lose(*lost)
        ranks.form()
        assert sorted(ranks.loads) == list(lost)
        assert torch.equal(ranks.logits(PROMPT), before)


def test_nothing_of_a_lost_group_is_kept_but_weights(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = AdapterOptions(max_loras=2)
    ranks = Ranks(tiny(tiny_models.path("llama"), adapters=adapters), 2, monkeypatch)
    runners = [weakref.ref(model.runner) for model in ranks.models]
    ranks.lose(1)
    assert all(one() is None for one in runners)


def test_a_way_that_one_rank_refuses_is_used_by_none(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tiny_models.path("llama"))
    ranks = Ranks(config, 2, monkeypatch)
    before, build = ranks.logits(PROMPT), WholeStepForward.build
    assert all(model.runner.forward_passes.ways[0].name == "whole_step" for model in ranks.models)

    def refusing(parts: ForwardParts) -> WholeStepForward:
        embedding = parts.model.get_input_embeddings()
        if isinstance(embedding, VocabParallelEmbedding) and embedding.collectives.rank == refuser:
            raise UnsupportedError("it has lost its compiler")
        return build(parts)

    monkeypatch.setattr(WholeStepForward, "build", refusing)
    for refuser in range(2):
        ranks.lose(refuser)
        ranks.form()
        assert [[way.name for way in model.runner.forward_passes.ways] for model in ranks.models] == [["modules"]] * 2
        refusals = [model.runner.forward_passes.refusals["whole_step"] for model in ranks.models]
        assert refusals[refuser] == "it has lost its compiler"
        assert refusals[1 - refuser] == "another rank does not use it"
        assert torch.allclose(ranks.logits(PROMPT), before, atol=1e-4)


def test_a_kernel_of_adapters_that_one_rank_does_not_have_is_used_by_none(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = CpuDevice.lora_kernel, itertools.count()
    monkeypatch.setattr(
        CpuDevice, "lora_kernel", lambda self, dtype: load(self, dtype) if next(calls) % 2 == 0 else None
    )
    ranks = Ranks(tiny(tiny_models.path("llama"), adapters=AdapterOptions(max_loras=2)), 2, monkeypatch)
    memories = [model.runner.adapter_memory for model in ranks.models]
    assert next(calls) == 2
    assert all(memory is not None and memory.kernel is None and memory.order == PLAIN for memory in memories)


def test_ranks_without_a_common_way_are_refused() -> None:
    class Others(SingleRank):
        def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(values)

    passes = ForwardPasses([types.SimpleNamespace(name="modules")])  # type: ignore[list-item]
    with pytest.raises(StartupError, match="no way to compute a step in common; this rank has modules"):
        passes.agree(Others())


def recorded(*results: torch.Tensor) -> ExchangeRecord:
    record = ExchangeRecord()
    for result in results:
        record.result(lambda result=result: result)  # type: ignore[misc]
    return ExchangeRecord.from_bytes(record.to_bytes())


def nothing() -> torch.Tensor:
    raise AssertionError("an exchange was made, though its result is recorded")


def test_a_record_gives_its_results_in_order() -> None:
    results = [
        torch.randn(3, 5),
        torch.empty(0, dtype=torch.uint8),
        torch.arange(4),
        torch.ones(2, dtype=torch.bfloat16),
    ]
    record = recorded(*results)
    assert all(torch.equal(record.result(nothing), result) for result in results)
    record.require_end()


@pytest.mark.parametrize(
    "use", [lambda record: record.require_end(), lambda record: [record.result(nothing) for _ in range(2)]]
)
def test_a_rank_that_loads_another_model_is_refused(use: Callable[[ExchangeRecord], Any]) -> None:
    record = recorded(torch.ones(2))
    with pytest.raises(StartupError, match="its files were changed"):
        use(record)
