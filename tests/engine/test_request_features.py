"""What requests ask of the engine beside tokens: beam search over its logprobs, predicted answers, salted caches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fastserve.engine.contract import EngineRequest, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.speculation.ngram import NgramProposer
from fastserve.engine.speculation.prediction import Prediction
from fastserve.worker.beam_search import BeamSearch, BeamSettings, FinishedBeam

from .conftest import TinyModels
from .test_engine_equality import EOS, Answer, make_core, random_prompt, run
from .test_speculation_equality import eager

PROMPT = [5, 9, 14, 3, 77, 20]


# ---- beam search ------------------------------------------------------------------------------------------------


def search(core: EngineCore, prompt_ids: list[int], settings: BeamSettings, max_tokens: int) -> list[FinishedBeam]:
    found = BeamSearch(settings, max_tokens)
    while found.beams:
        for number, beam in enumerate(found.beams):
            params = SamplingParams(1, temperature=0.0, logprobs=settings.num_top)
            core.add(EngineRequest(str(number), prompt_ids + beam.token_ids, params))
        tops: dict[str, list[tuple[int, float]]] = {}
        while core.has_work:
            for output in core.step():
                if output.logprobs:
                    tops[output.request_id] = output.logprobs[0].top
        found.step([tops[str(number)] for number in range(len(found.beams))])
    return found.finished


@pytest.fixture(scope="module")
def core(tiny_models: TinyModels) -> EngineCore:
    return make_core(tiny_models.path("llama"), speculative_method="off")


@pytest.mark.parametrize(
    ("width", "length_penalty", "max_tokens", "stop_token_ids"),
    [(4, 1.0, 12, [EOS]), (3, 0.0, 10, [EOS, 7]), (2, 2.0, 10, list(range(1, 40))), (5, -1.0, 8, list(range(1, 60)))],
)
def test_beam_search_finds_what_transformers_finds(
    tiny_models: TinyModels,
    core: EngineCore,
    width: int,
    length_penalty: float,
    max_tokens: int,
    stop_token_ids: list[int],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.path("llama"), dtype=torch.float32).eval()
    rng = random.Random(width)
    for _ in range(3):
        prompt_ids = random_prompt(rng, 160)
        found = search(core, prompt_ids, BeamSettings(width, length_penalty, frozenset(stop_token_ids)), max_tokens)
        expected = model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=max_tokens,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=False,
            do_sample=False,
            eos_token_id=stop_token_ids,
            pad_token_id=159,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = [ids[len(prompt_ids) :].tolist() for ids in expected.sequences]
        for beam, ids in zip(found, answers, strict=True):
            assert beam.token_ids == ids[: len(beam.token_ids)]
            assert set(ids[len(beam.token_ids) :]) <= {159}
        assert [beam.score for beam in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
        assert all((beam.token_ids[-1] in stop_token_ids) == (beam.finish_reason == "stop") for beam in found)


# ---- predicted answers ------------------------------------------------------------------------------------------


def test_a_prediction_changes_no_token_and_saves_steps(tiny_models: TinyModels) -> None:
    path = tiny_models.path("llama")
    params = SamplingParams(40, temperature=0.8, seed=3)
    plain = make_core(path, speculative_method="off")
    answers = {"r": Answer()}
    plain.add(EngineRequest("r", PROMPT, params))
    run(plain, answers)
    expected = answers["r"].token_ids
    changed = [*expected[:15], 2, 2, 2, *expected[18:]]
    steps = {}
    for name, predicted in (("right", expected), ("changed", changed), ("wrong", [2, 3] * 20), ("none", [])):
        core = make_core(path)
        core._speculator = core.scheduler._drafting = eager(NgramProposer())
        answers = {"r": Answer()}
        core.add(EngineRequest("r", PROMPT, params, predicted_ids=predicted))
        run(core, answers)
        assert answers["r"].token_ids == expected, name
        steps[name] = core.stats.steps
    assert steps["right"] <= 8
    assert steps["right"] < steps["changed"] < steps["wrong"] <= 41
    assert steps["none"] > steps["changed"]


@settings(max_examples=200, deadline=None)
@given(
    predicted=st.lists(st.integers(0, 4), max_size=30),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    answer=st.lists(st.integers(0, 4), max_size=30),
)
def test_no_predicted_token_counts_twice(predicted: list[int], prompt: list[int], answer: list[int]) -> None:
    """Whatever the answer is, and however it comes; a prediction that is the answer counts as a whole."""
    at_once = Prediction(predicted, len(prompt))
    at_once.follow(prompt + answer)
    one_by_one = Prediction(predicted, len(prompt))
    for end in range(len(answer) + 1):
        drafts = one_by_one.drafts(prompt + answer[:end], 4)
        assert len(drafts) <= 4
    assert one_by_one.num_matched == at_once.num_matched <= min(len(predicted), len(answer))
    if predicted == answer:
        assert at_once.num_matched == len(answer)


# ---- salted caches ----------------------------------------------------------------------------------------------


def cached(core: EngineCore, prompt_ids: Sequence[int], salt: str) -> int:
    answers = {"r": Answer()}
    params = SamplingParams(3, temperature=0.0)
    core.add(msgspec.structs.replace(EngineRequest("r", list(prompt_ids), params), cache_salt=salt))
    run(core, answers)
    return answers["r"].num_cached_tokens


def test_only_requests_with_the_same_salt_share_the_cache(tiny_models: TinyModels) -> None:
    core = make_core(tiny_models.path("llama"), block_size=4, speculative_method="off")
    rng = random.Random(2)
    prompt = [rng.randrange(2, 160) for _ in range(33)]
    num_roots = len(core.scheduler.pool._roots)
    for salt in ("", "mine", "yours", "x" * 1024):
        assert cached(core, prompt, salt) == 0
        assert cached(core, prompt, salt) == 32
        assert cached(core, [*prompt[:17], 2, 2, 2], salt) == 16
    assert len(core.scheduler.pool._roots) <= num_roots + 1, "salts leave nothing behind"
