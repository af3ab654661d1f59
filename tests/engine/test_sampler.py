"""The sampler: distributions against their definition, and independence of rows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import TypicalLogitsWarper

from fastserve.engine.contract import SamplingParams, TokenLogprob
from fastserve.engine.sampling import noise, typical_p
from fastserve.engine.sampling.processor import SamplingRow
from fastserve.engine.sampling.sampler import Sampler
from fastserve.engine.transfers import Readback

VOCABULARY = 6
LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
SAMPLES = 4000
SAMPLER = Sampler()


def row(
    params: SamplingParams, answer: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), choice: int = 0
) -> SamplingRow:
    state = SAMPLER.start(params, choice, len(prompt))
    return SamplingRow(state, np.array(prompt + answer, dtype=np.int32))


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> tuple[list[int], list[TokenLogprob | None]]:
    readback = Readback()
    sampled = SAMPLER.sample(logits, rows, readback)
    readback.close()
    readback.wait()
    return sampled.result()


def frequencies(**settings: float) -> list[float]:
    """How often each token is sampled over many seeds, all in one batch."""
    rows = [row(SamplingParams(1, seed=seed, **settings)) for seed in range(SAMPLES)]  # type: ignore[arg-type]
    sampled, _ = sample(LOGITS.expand(SAMPLES, -1), rows)
    counts = Counter(sampled)
    return [counts[token] / SAMPLES for token in range(VOCABULARY)]


def assert_close(found: list[float], expected: torch.Tensor) -> None:
    for share, probability in zip(found, expected.tolist(), strict=True):
        # Five standard deviations of a binomial share.
        assert abs(share - probability) <= 5 * math.sqrt(max(probability * (1 - probability), 1e-9) / SAMPLES) + 1e-9


def renormalised(keep: list[int], temperature: float = 1.0) -> torch.Tensor:
    probabilities = (LOGITS[0] / temperature).softmax(-1)
    mask = torch.zeros(VOCABULARY)
    mask[keep] = 1
    return probabilities * mask / (probabilities * mask).sum()


def test_plain_sampling_follows_the_softmax() -> None:
    assert_close(frequencies(), LOGITS[0].softmax(-1))


def test_temperature_scales() -> None:
    assert_close(frequencies(temperature=2.0), (LOGITS[0] / 2).softmax(-1))


@pytest.mark.parametrize(
    ("settings", "keep"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),  # 0.57 and 0.21 are below 0.8 together; the third crosses it
        ({"top_p": 0.01}, [0]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.7}, [0, 1]),  # top-p acts on what top-k leaves, renormalised
    ],
)
def test_filters_keep_what_their_definition_keeps(settings: dict[str, float], keep: list[int]) -> None:
    assert_close(frequencies(**settings), renormalised(keep))


def test_temperature_zero_and_top_k_one_are_greedy() -> None:
    rows = [row(SamplingParams(1, temperature=0.0)), row(SamplingParams(1, top_k=1, seed=3))]
    assert sample(LOGITS.expand(2, -1), rows)[0] == [0, 0]


def test_penalties_count_what_they_are_defined_to_count() -> None:
    def best(params: SamplingParams, answer: tuple[int, ...], prompt: tuple[int, ...] = (5,)) -> int:
        return sample(LOGITS, [row(params, answer, prompt)])[0][0]

    greedy = {"temperature": 0.0}
    assert best(SamplingParams(1, presence_penalty=1.5, **greedy), (0,)) == 1  # type: ignore[arg-type]
    assert best(SamplingParams(1, presence_penalty=0.9, **greedy), (0, 0, 0)) == 0  # type: ignore[arg-type]
    assert best(SamplingParams(1, frequency_penalty=0.9, **greedy), (0,)) == 0  # type: ignore[arg-type]
    assert best(SamplingParams(1, frequency_penalty=0.9, **greedy), (0, 0)) == 1  # type: ignore[arg-type]
    # Presence and frequency penalties apply to tokens of the answer only, repetition to the prompt too.
    assert best(SamplingParams(1, presence_penalty=2.0, **greedy), (), (0,)) == 0  # type: ignore[arg-type]
    assert best(SamplingParams(1, repetition_penalty=3.0, **greedy), (), (0,)) == 1  # type: ignore[arg-type]


def test_bias_and_min_tokens() -> None:
    biased = SamplingParams(1, temperature=0.0, logit_bias={4: 10.0})
    assert sample(LOGITS, [row(biased)])[0] == [4]
    held = SamplingParams(5, temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    assert sample(LOGITS, [row(held, (3,))])[0] == [1]
    assert sample(LOGITS, [row(held, (3, 3))])[0] == [0]


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(1, temperature=0.0, logit_bias={3: 50.0}, logprobs=2)
    sampled, logprobs = sample(LOGITS, [row(params)])
    expected = LOGITS[0].log_softmax(-1).tolist()
    assert sampled == [3]
    assert logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(expected[3])
    assert [token for token, _ in logprobs[0].top] == [0, 1]
    assert [value for _, value in logprobs[0].top] == pytest.approx(expected[:2])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 50)
    rows = [
        row(SamplingParams(9, temperature=0.5 + index % 3, top_k=index % 4 * 5, top_p=1 - index % 2 * 0.2, seed=index))
        for index in range(40)
    ]
    together = sample(logits, rows)[0]
    assert together == [sample(logits[index : index + 1], rows[index : index + 1])[0][0] for index in range(40)]


def test_noise_is_keyed_by_seed_choice_and_position() -> None:
    keys = [(seed, choice, position) for seed in range(12) for choice in range(12) for position in range(12)]
    values = [noise.uniform(noise.key(seed, choice), position) for seed, choice, position in keys]
    assert values == [noise.uniform(noise.key(seed, choice), position) for seed, choice, position in keys]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 5 / math.sqrt(12 * len(values))


TYPICAL = torch.tensor([[1.0, 0.1, 0.05, 0.0, -0.05, -0.1]])
"""Its likeliest token (0.35) surprises much less than a token on average."""


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5, 0.9, 0.99])
def test_typical_p_alone_keeps_what_transformers_keeps(share: float) -> None:
    torch.manual_seed(1)
    logits = torch.cat([TYPICAL.expand(1, -1), LOGITS, 3 * torch.randn(30, VOCABULARY)])
    logits[3] = logits[3].round()  # tokens that are equally likely stand or fall together
    expected = TypicalLogitsWarper(share)(torch.zeros(1, 1, dtype=torch.long), logits).isfinite()
    found = typical_p.keep_mask(logits.softmax(-1), torch.full((len(logits), 1), share))
    assert found.tolist() == expected.tolist()
    assert 0 < expected.sum() < expected.numel()


def test_typical_p_may_cut_off_the_likeliest_and_comes_after_the_other_filters() -> None:
    def sampled(**settings: float) -> set[int]:
        rows = [row(SamplingParams(1, seed=seed, **settings)) for seed in range(500)]  # type: ignore[arg-type]
        return set(sample(TYPICAL.expand(500, -1), rows)[0])

    assert sampled(typical_p=0.1) == {1}
    assert sampled(typical_p=1.0) == set(range(VOCABULARY))
    # Of tokens 0 and 1 alone, the likeliest is the nearest to their entropy: what top-k cut no longer counts.
    assert sampled(typical_p=0.1, top_k=2) == {0}


def test_typical_p_of_one_row_leaves_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    rows = [row(SamplingParams(9, top_k=30, typical_p=(1.0, 0.3)[index % 2], seed=index)) for index in range(20)]
    together = sample(logits, rows)[0]
    assert together == [sample(logits[index : index + 1], rows[index : index + 1])[0][0] for index in range(20)]
