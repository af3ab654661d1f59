"""Contract tests of logits processors, and one more processor, added to the engine by its file and an entry in the
list (token_mask.py)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.device import Arrays
from fastserve.engine.sampling import batch as batch_module
from fastserve.engine.sampling.allowed_tokens import AllowedTokens
from fastserve.engine.sampling.bad_words import BadWords
from fastserve.engine.sampling.history import TokenCounts
from fastserve.engine.sampling.logit_bias import LogitBias
from fastserve.engine.sampling.min_p import MinP
from fastserve.engine.sampling.min_tokens import MinTokens
from fastserve.engine.sampling.order import LOGITS_PROCESSORS, needs_last_token
from fastserve.engine.sampling.output_penalties import OutputPenalties
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow, SamplingState, Stage
from fastserve.engine.sampling.repetition_penalty import RepetitionPenalty
from fastserve.engine.sampling.sampler import Sampler
from fastserve.engine.sampling.top_k import TopK
from fastserve.engine.sampling.top_p import TopP
from fastserve.engine.sampling.typical_p import TypicalP
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.speculator import PlaceholderProposer
from fastserve.engine.transfers import Readback, to_device

from .conftest import TinyModels
from .test_engine_equality import Answer, collect, make_core, random_prompt, run
from .test_speculation_equality import eager
from .token_mask import MaskedParams, TokenMask, is_allowed

PROCESSORS = (*LOGITS_PROCESSORS, TokenMask())
LENGTH = 40
"""max_tokens of the examples."""
EXAMPLES: dict[type[LogitsProcessor], list[SamplingParams]] = {
    LogitBias: [SamplingParams(LENGTH, logit_bias={3: 5.0, 9: -100.0}), SamplingParams(LENGTH, logit_bias={0: 1.0})],
    AllowedTokens: [
        SamplingParams(LENGTH, allowed_token_ids=(5,)), SamplingParams(LENGTH, allowed_token_ids=tuple(range(20, 45))),
    ],
    BadWords: [
        SamplingParams(LENGTH, bad_token_ids=((4,), (9,))),
        SamplingParams(LENGTH, bad_token_ids=((7,), (1, 2), (2, 3, 3), (8, 7))),
    ],
    MinTokens: [SamplingParams(LENGTH, min_tokens=30, stop_token_ids=(2, 7))],
    RepetitionPenalty: [
        SamplingParams(LENGTH, repetition_penalty=1.3), SamplingParams(LENGTH, repetition_penalty=0.8),
    ],
    OutputPenalties: [
        SamplingParams(LENGTH, presence_penalty=1.0),
        SamplingParams(LENGTH, frequency_penalty=-0.4),
        SamplingParams(LENGTH, presence_penalty=-0.5, frequency_penalty=0.3),
    ],
    TopK: [SamplingParams(LENGTH, top_k=2), SamplingParams(LENGTH, top_k=20)],
    TopP: [SamplingParams(LENGTH, top_p=0.3), SamplingParams(LENGTH, top_p=0.95)],
    MinP: [SamplingParams(LENGTH, min_p=0.05), SamplingParams(LENGTH, min_p=0.5)],
    TypicalP: [SamplingParams(LENGTH, typical_p=0.2), SamplingParams(LENGTH, typical_p=0.9)],
    TokenMask: [MaskedParams(LENGTH), MaskedParams(LENGTH, modulus=7)],
}  # fmt: skip
"""Requests that each processor, and no other, concerns."""
VOCABULARY = 50

each_processor = pytest.mark.parametrize("processor", PROCESSORS, ids=lambda item: type(item).__name__)


NUM_PROMPT = 4
SAMPLER = Sampler(PROCESSORS)


def start(params: SamplingParams) -> SamplingState:
    """As when the runner meets a sequence: a new one, or one that was preempted."""
    return SAMPLER.start(params, 0, NUM_PROMPT)


def row(state: SamplingState, token_ids: Sequence[int]) -> SamplingRow:
    return SamplingRow(state, np.array(token_ids, dtype=np.int32))


def random_tokens(rng: random.Random, longest: int = 20) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(NUM_PROMPT + rng.randint(1, longest))]


def random_values(processor: LogitsProcessor, num_rows: int) -> torch.Tensor:
    """As its stage has them, flat ones and ones so steep that sums of their tails are lost to rounding."""
    logits = torch.randint(1, 12, (num_rows, 1)) * torch.randn(num_rows, VOCABULARY)
    return logits if processor.stage is Stage.LOGITS else logits.softmax(-1).sort(dim=-1, descending=True).values


def applied(processor: LogitsProcessor, values: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The values of a batch after a processor."""
    values = values.clone()
    some = [(at, item) for at, item in enumerate(rows) if processor in item.state.processors]
    if some:
        constant = processor.batch_inputs([(at, item.params) for at, item in some], (len(rows), values.shape[1]))
        changing = processor.step_inputs(iter(some), values.shape[1])
        if changing is not None:
            processor.apply(values, to_device([*constant, *changing], values.device))
    return values


def test_the_list_is_in_the_order_of_the_stages_and_every_processor_has_examples() -> None:
    stages = [processor.stage for processor in LOGITS_PROCESSORS]
    assert stages == sorted(stages, key=list(Stage).index)
    assert set(EXAMPLES) == {type(processor) for processor in PROCESSORS}


@each_processor
def test_it_concerns_requests_that_set_its_parameters_and_no_others(processor: LogitsProcessor) -> None:
    assert not processor.concerns(SamplingParams(LENGTH))
    for kind, examples in EXAMPLES.items():
        assert [processor.concerns(params) for params in examples] == [kind is type(processor)] * len(examples)


@each_processor
def test_rows_that_it_does_not_concern_keep_every_bit(processor: LogitsProcessor) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    mixed = [params for examples in EXAMPLES.values() for params in examples] * 3
    rng.shuffle(mixed)
    values = random_values(processor, len(mixed))
    found = applied(processor, values, [row(start(params), random_tokens(rng)) for params in mixed])
    for params, before, after in zip(mixed, values, found, strict=True):
        assert torch.equal(before, after) != processor.concerns(params)


@each_processor
def test_a_row_does_not_depend_on_the_others_of_its_batch(processor: LogitsProcessor) -> None:
    torch.manual_seed(1)
    rng = random.Random(1)
    mixed = [params for examples in EXAMPLES.values() for params in examples] + 4 * EXAMPLES[type(processor)]
    rng.shuffle(mixed)
    values = random_values(processor, len(mixed))
    tokens = [random_tokens(rng) for _ in mixed]
    together = applied(processor, values, [row(start(params), ids) for params, ids in zip(mixed, tokens, strict=True)])
    for at, params in enumerate(mixed):
        alone = applied(processor, values[at : at + 1], [row(start(params), tokens[at])])
        assert torch.equal(together[at : at + 1], alone)


@each_processor
def test_a_state_is_right_after_commits_wrong_drafts_and_preemption(processor: LogitsProcessor) -> None:
    """Whatever a sequence went through, its rows are those of one that is introduced with the same tokens."""
    torch.manual_seed(2)
    rng = random.Random(2)
    states = [(start(params), params, random_tokens(rng, 2)) for params in 3 * EXAMPLES[type(processor)]]
    for _ in range(25):
        rows, fresh = [], []
        for state, params, tokens in states:
            drafts = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(4))]
            for count in range(len(drafts) + 1):
                rows.append(row(state, tokens + drafts[:count]))
                fresh.append(row(start(params), tokens + drafts[:count]))
            # Some of the drafts are right, and one token comes after them.
            tokens += [*drafts[: rng.randint(0, len(drafts))], rng.randrange(VOCABULARY)]
        values = random_values(processor, len(rows))
        assert torch.equal(applied(processor, values, rows), applied(processor, values, fresh))
        states = [(start(params) if rng.random() < 0.1 else state, params, tokens) for state, params, tokens in states]


@each_processor
def test_who_needs_no_last_token_does_not_look_at_it(processor: LogitsProcessor) -> None:
    torch.manual_seed(3)
    rng = random.Random(3)
    for params in EXAMPLES[type(processor)]:
        tokens = random_tokens(rng)
        values = random_values(processor, 1)
        found = {
            tuple(applied(processor, values, [row(start(params), [*tokens[:-1], last])]).flatten().tolist())
            for last in range(VOCABULARY)
        }
        assert (len(found) > 1) == processor.needs_last_token(params)
        assert needs_last_token(PROCESSORS, params) == processor.needs_last_token(params)


@pytest.mark.parametrize(
    "processor",
    [item for item in PROCESSORS if item.stage is Stage.PROBABILITIES],
    ids=lambda item: type(item).__name__,
)
def test_a_filter_cuts_and_leaves_a_token(processor: LogitsProcessor) -> None:
    torch.manual_seed(4)
    for params in EXAMPLES[type(processor)]:
        values = random_values(processor, 200)
        found = applied(processor, values, [row(start(params), [0] * NUM_PROMPT)] * 200)
        assert ((found == values) | (found == 0)).all()
        assert (found > 0).any(dim=-1).all()


def test_counts_of_tokens_follow_what_comes_and_goes() -> None:
    rng = np.random.default_rng(0)
    counts = TokenCounts()
    tokens = np.empty(0, dtype=np.int32)
    for _ in range(300):
        tokens = tokens[: rng.integers(0, len(tokens) + 1)] if rng.random() < 0.3 else tokens
        tokens = np.concatenate([tokens, rng.integers(0, 200, rng.integers(0, 12)).astype(np.int32)])
        ids, numbers = counts.update(tokens)
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == Counter(tokens.tolist())


# ---- in the sampler ---------------------------------------------------------------------------------------------


def test_a_step_has_one_transfer_and_a_greedy_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []

    def counting(arrays: Arrays, device: torch.device) -> list[torch.Tensor]:
        transfers.append(len(arrays))
        return to_device(arrays, device)

    monkeypatch.setattr(batch_module, "to_device", counting)
    mixed = [params for examples in EXAMPLES.values() for params in examples]
    for batch, num_transfers in (([SamplingParams(LENGTH, temperature=0.0)] * 5, 0), (mixed, 1)):
        sampler = Sampler(PROCESSORS)
        states = [sampler.start(params, 0, NUM_PROMPT) for params in batch]
        transfers.clear()
        for length in range(5, 9):
            rows = [row(state, [1] * length) for state in states]
            sampler.sample(torch.randn(len(batch), VOCABULARY), rows, Readback())
        assert len(transfers) == 1 + 4 * num_transfers, "one when the batch is new, and those of the steps"


# ---- in the engine ----------------------------------------------------------------------------------------------


def requests(rng: random.Random) -> list[EngineRequest]:
    """One of each example, greedy and sampled, and some that no processor concerns."""
    shared = random_prompt(rng, 160) * 2
    every = [params for examples in EXAMPLES.values() for params in examples] + [SamplingParams(LENGTH)] * 3
    return [
        EngineRequest(
            f"r{index}",
            shared[: rng.randint(4, 20)] + random_prompt(rng, 160, 8),
            type(params)(
                **{name: getattr(params, name) for name in params.__struct_fields__}
                | {"max_tokens": rng.randint(8, 30), "temperature": rng.choice([0.0, 0.3, 1.0]), "seed": index}
            ),
        )
        for index, params in enumerate(every)
    ]


def crowded_core(tiny_models: TinyModels, kind: str) -> EngineCore:
    settings: dict[str, dict[str, Any]] = {
        "overlap": {"overlap": True},
        "ngram": {},
        "draft model": {"speculative_model_dir": tiny_models.path("llama")},
    }
    core = make_core(
        tiny_models.path("llama"),
        processors=PROCESSORS,
        speculative_method="off",
        block_size=4,
        max_num_batched_tokens=21,
        max_total_tokens=112,
        max_model_len=80,
        **settings[kind],
    )
    if kind != "overlap":
        proposer = NgramProposer() if kind == "ngram" else PlaceholderProposer()
        core._speculator = core.scheduler._drafting = eager(proposer)
    return core


@pytest.fixture(scope="module")
def expected(tiny_models: TinyModels) -> dict[str, Answer]:
    """Each request alone, and those that are not masked in an engine that knows no mask."""
    path = tiny_models.path("llama")
    with_mask = make_core(path, processors=PROCESSORS, speculative_method="off")
    without = make_core(path, speculative_method="off")
    answers: dict[str, Answer] = {}
    for request in requests(random.Random(6)):
        core = with_mask if isinstance(request.params, MaskedParams) else without
        answers[request.request_id] = Answer()
        core.add(request)
        run(core, answers)
    return answers


@pytest.mark.parametrize("kind", ["overlap", "ngram", "draft model"])
def test_a_new_processor_and_all_others_work_in_the_engine(
    tiny_models: TinyModels, expected: dict[str, Answer], kind: str
) -> None:
    """With preemption, chunked prefill, prefix hits, and steps ahead or speculation."""
    core = crowded_core(tiny_models, kind)
    rng = random.Random(7)
    waiting = requests(random.Random(6))
    masked = [request for request in waiting if isinstance(request.params, MaskedParams)]
    answers = {request.request_id: Answer() for request in waiting}
    while waiting or core.has_work:
        while waiting and rng.random() < 0.6:
            core.add(waiting.pop())
        collect(core, answers)
    assert core.stats.preemptions > 0
    assert (core.stats.accepted_tokens > 0) == (kind != "overlap")
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    for request in masked:
        assert isinstance(request.params, MaskedParams)
        assert is_allowed(answers[request.request_id].token_ids, request.params.modulus)
    assert len(masked) == len(EXAMPLES[TokenMask])
