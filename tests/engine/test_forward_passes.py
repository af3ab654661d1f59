"""The ways to compute a step: a new one is one file, the first that supports a step is used, and reasons are logged."""

from __future__ import annotations

import logging
from typing import ClassVar, Self

import pytest
import torch

from fastserve.engine.core import EngineCore
from fastserve.engine.runner.forward import find
from fastserve.engine.runner.forward.find import ForwardPasses
from fastserve.engine.runner.forward.forward_pass import AbsentError, ForwardParts, ForwardPass, UnsupportedError
from fastserve.engine.runner.forward.modules import ModulesForward
from fastserve.engine.runner.forward.whole_step import WholeStepForward
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.runner import ModelRunner
from fastserve.errors import StartupError

from .conftest import TinyModels
from .test_engine_equality import EOS, Answer, greedy, make_core, run

PROMPT = [5, 6, 7, 8, 9]


class ShortSteps(ModulesForward):
    """One more way, for steps of one token; `error` is added to its logits."""

    name: ClassVar[str] = "short_steps"
    refusal: ClassVar[Exception | None] = None
    error: ClassVar[float] = 0.0
    num_tokens: ClassVar[list[int]] = []

    @classmethod
    def build(cls, parts: ForwardParts) -> Self:
        if cls.refusal is not None:
            raise cls.refusal
        return super().build(parts)

    def supports(self, step: PackedStep) -> str | None:
        return None if len(step.input_ids) == 1 else "it has several tokens"

    def __call__(self, step: PackedStep) -> torch.Tensor:
        self.num_tokens.append(len(step.input_ids))
        return super().__call__(step) + self.error * torch.arange(160)


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> type[ShortSteps]:
    monkeypatch.setattr(find, "FORWARD_PASSES", (ShortSteps, *find.FORWARD_PASSES))
    monkeypatch.setattr(ShortSteps, "num_tokens", [])
    return ShortSteps


def answer(core: EngineCore) -> list[int]:
    answers = {"r": Answer()}
    core.add(greedy(PROMPT, 8))
    run(core, answers)
    return answers["r"].token_ids


def passes(core: EngineCore) -> ForwardPasses:
    runner = core._executor
    assert isinstance(runner, ModelRunner)
    return runner.forward_passes


def test_one_more_way_takes_the_steps_that_it_supports(
    tiny_models: TinyModels, one_more: type[ShortSteps], caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_models.path("llama")
    core = make_core(path, speculative_method="off")
    one_more.num_tokens.clear()
    with caplog.at_level(logging.DEBUG, logger=find.__name__):
        found = answer(core)
    assert found == tiny_models.reference(path, PROMPT, 8, [EOS])
    assert one_more.num_tokens == [1] * (len(found) - 1), "the prompt is computed another way"
    assert "a step of 5 tokens is not computed by short_steps: it has several tokens" in caplog.text


@pytest.mark.parametrize("error", [UnsupportedError("the moon is full"), AbsentError("the moon is full")])
def test_why_a_model_cannot_be_computed_a_way_is_in_the_log_and_in_the_engine_info(
    tiny_models: TinyModels,
    one_more: type[ShortSteps],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: UnsupportedError,
) -> None:
    monkeypatch.setattr(one_more, "refusal", error)
    with caplog.at_level(logging.DEBUG, logger=find.__name__):
        core = make_core(tiny_models.path("llama"))
    assert "LlamaForCausalLM: no short_steps: the moon is full" in caplog.text
    assert passes(core).refusals["short_steps"] == "the moon is full"
    reasons = {layers.kind: layers.reason for layers in core.info.fused_layers}
    # What no model has on this machine is no news of this model.
    assert reasons.get("short_steps") == (None if isinstance(error, AbsentError) else "the moon is full")
    assert "graphs" not in reasons


class WrongSteps(ShortSteps):
    name: ClassVar[str] = "wrong_steps"
    error: ClassVar[float] = 0.1

    def supports(self, step: PackedStep) -> str | None:
        return None


def test_a_way_that_computes_something_else_is_dropped_and_the_last_one_refuses_the_model(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_models.path("llama")
    monkeypatch.setattr(find, "FORWARD_PASSES", (WrongSteps, *find.FORWARD_PASSES))
    core = make_core(path)
    assert "forward pass by wrong_steps" in caplog.text
    assert [way.name for way in passes(core).ways] == ["whole_step", "modules"]
    assert answer(core) == tiny_models.reference(path, PROMPT, 8, [EOS])
    only: tuple[type[ForwardPass], ...] = (WrongSteps,)
    monkeypatch.setattr(find, "FORWARD_PASSES", only)
    with pytest.raises(StartupError, match="the engine's logits differ from those of the model's own code"):
        make_core(path)


@pytest.mark.parametrize(
    "error", [KeyError("full_attention"), TypeError("no such argument"), ArithmeticError(0)], ids=repr
)
def test_a_way_that_fails_while_it_is_built_leads_to_the_slower_ones(
    tiny_models: TinyModels, one_more: type[ShortSteps], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, error: Exception,
) -> None:  # fmt: skip
    expected = answer(make_core(tiny_models.path("llama")))
    monkeypatch.setattr(ShortSteps, "refusal", error)
    core = make_core(tiny_models.path("llama"))
    assert answer(core) == expected
    assert [layers.reason for layers in core.info.fused_layers if layers.kind == "short_steps"] == [
        f"it fails for this model ({type(error).__name__}: {error})"
    ]
    assert "LlamaForCausalLM is not computed by short_steps, which fails for it: slower ways are used." in caplog.text


def test_the_failure_of_the_slowest_way_is_the_models(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(ShortSteps):
        refusal: ClassVar[Exception | None] = KeyError("no way")

    monkeypatch.setattr(find, "FORWARD_PASSES", (WholeStepForward, Failing))
    with pytest.raises(StartupError, match=r"^LlamaForCausalLM cannot be served: its code failed .*no way"):
        make_core(tiny_models.path("llama"))
