"""A draft model beside ranks: whole on rank 0, which sends what it drafts with each plan."""

from __future__ import annotations

import queue
import random

import msgspec
import pytest

from fastserve.engine.build import build_core, build_rank
from fastserve.engine.contract import EngineStats
from fastserve.engine.follower import follow
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.messages import EndRank, RankCommand
from fastserve.engine.ranks.thread_collectives import run_ranks
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.settings import EngineConfig
from fastserve.engine.speculation.speculator import PlaceholderProposer

from .conftest import TinyModels
from .test_engine_equality import BASE, Answer, make_core, run
from .test_speculation_equality import eager, mixed_requests


@pytest.mark.parametrize("draft", ["llama", "qwen2"])
def test_a_draft_model_beside_ranks_changes_no_answer(tiny_models: TinyModels, draft: str) -> None:
    """Greedy and sampled, with preemption, chunked prefill and prefix hits: as one rank answers without drafts."""
    requests = mixed_requests(random.Random(5), 16)
    path = tiny_models.path("llama")
    plain = make_core(path, speculative_method="off")
    expected = {request.request_id: Answer() for request in requests}
    for request in requests:
        plain.add(request)
        run(plain, expected)
    config = EngineConfig(
        model_dir=path, speculative_model_dir=tiny_models.path(draft),
        **{**BASE, "block_size": 4, "max_num_batched_tokens": 21, "max_total_tokens": 112, "max_model_len": 100},
    )  # fmt: skip
    commands: queue.Queue[bytes] = queue.Queue()
    answers = {request.request_id: Answer() for request in requests}

    def run_rank(collectives: Collectives) -> EngineStats | None:
        if collectives.rank == 1:
            model = build_rank(config, lambda *_: None, LOGITS_PROCESSORS, collectives)
            assert model.draft is None
            follow(collectives, model, lambda: msgspec.msgpack.decode(commands.get(timeout=20), type=RankCommand))
            return None
        try:
            core = build_core(
                config, lambda *_: None, collectives=collectives,
                send_to_ranks=lambda command, rank=None: commands.put(msgspec.msgpack.encode(command)),
            )  # fmt: skip
            core._speculator = core.scheduler._drafting = eager(PlaceholderProposer())
            for request in requests:
                assert core.add(request) is None
            run(core, answers)
            assert core.scheduler.preemptions > 0
            return core.stats
        finally:
            commands.put(msgspec.msgpack.encode(EndRank()))

    stats, _ = run_ranks(2, run_rank)
    assert stats is not None
    assert stats.draft_tokens > 30
    if draft == "llama":
        assert stats.accepted_tokens > 0.95 * stats.draft_tokens
    else:
        assert stats.accepted_tokens < 0.5 * stats.draft_tokens
    for name, answer in expected.items():
        assert (answers[name].token_ids, answers[name].finish_reason) == (answer.token_ids, answer.finish_reason)
