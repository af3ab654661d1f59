"""Adapters that change the embedding or the LM head, for the rows of their requests only. The reference is PEFT's model
with the adapter beside its layers: where the two weights are tied, one of them changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastserve.engine.runner.runner import ModelRunner
from fastserve.errors import InvalidRequestError

from .adapters import Adapters, edit, edit_tensors
from .conftest import TinyModels, keep_way
from .test_adapters import Answer, load, request, run, serve

TOLERANCE = 1e-4
TARGETS = {"in": ["embed_tokens"], "out": ["lm_head", "q_proj"], "both": ["embed_tokens", "lm_head", "down_proj"]}


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tiny_models, tmp_path_factory.mktemp("adapters"))


def assert_same_logprobs(model: PreTrainedModel, prompt: list[int], found: Answer) -> None:
    assert found.error is None
    ids = prompt + found.token_ids
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[at, token]) for at, token in enumerate(ids[1:])]
    at = len(prompt) - 1
    assert found.logprobs == pytest.approx(expected[at:], abs=TOLERANCE)
    assert found.prompt_logprobs in ([], pytest.approx(expected[:at], abs=TOLERANCE))
    assert found.token_ids == logprobs[at:-1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["llama", "tied", "gemma2"])
def test_a_mixture_with_changed_vocabularies_is_answered_as_with_each_adapter_unmerged(
    adapters: Adapters, tmp_path: Path, name: str
) -> None:
    base = adapters.base(name)
    folders = {
        kind: adapters.make(base, tmp_path / kind, {"target_modules": targets, "r": 5 + 4 * index})
        for index, (kind, targets) in enumerate(TARGETS.items())
    }
    core = serve(base, folders, settings={"no_prefix_cache": True})
    assert isinstance(core._executor, ModelRunner)
    names = ["both", "", "in", "out", "both", ""]
    requests = [
        request(f"r{index}", [7 + (3 * index + 5 * at) % 150 for at in range(4 + 7 * index)], 4, adapter, logprobs=0,
                prompt_logprobs=index % 2 or None)
        for index, adapter in enumerate(names)
    ]  # fmt: skip
    models = {name: adapters.unmerged(base, folders.get(name)) for name in ("", *folders)}
    for way in ("whole_step", "modules"):
        assert core._executor.forward_passes.ways[0].name == way
        answers = run(core, requests)
        for one in requests:
            assert_same_logprobs(models[one.adapter], one.prompt_ids, answers[one.request_id])
        keep_way(core._executor, "modules")
    assert {info.name: info.targets for info in core.adapters.infos()} == {
        kind: tuple(sorted(targets)) for kind, targets in TARGETS.items()
    }


def test_rows_of_the_bare_base_keep_their_bits_beside_changed_vocabularies(adapters: Adapters, tmp_path: Path) -> None:
    base = adapters.base("tied")
    folders = {"both": adapters.make(base, tmp_path / "both", {"target_modules": TARGETS["both"]})}
    core = serve(base, folders, settings={"no_prefix_cache": True})
    assert isinstance(core._executor, ModelRunner)
    bare = request("bare", list(range(2, 40)), 5, logprobs=0, prompt_logprobs=0)
    for way in ("whole_step", "modules"):
        assert core._executor.forward_passes.ways[0].name == way
        found = [run(core, [request("other", [5, 6, 7], 5, neighbour, logprobs=0), bare]) for neighbour in ("both", "")]
        assert found[0]["bare"] == found[1]["bare"]
        assert found[0]["other"].logprobs != found[1]["other"].logprobs
        keep_way(core._executor, "modules")


def test_an_adapter_whose_file_has_another_base_vocabulary_is_refused(adapters: Adapters, tmp_path: Path) -> None:
    base = adapters.base("llama")
    core = serve(base, {})
    folder = adapters.make(base, tmp_path / "x", {"target_modules": ["embed_tokens"]})
    edit_tensors(folder, lambda tensors: tensors)
    load(core, "same", folder)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        [name] = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
        tensors[name][159] += 1e-3
        return tensors

    edit_tensors(folder, change)
    with pytest.raises(InvalidRequestError, match=r"differs from model\.embed_tokens of the base model"):
        load(core, "other", folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"target_modules": ["lm_head"]}, "not for model.embed_tokens"),
    ],
)
def test_changes_of_the_vocabulary_that_are_ambiguous_are_refused_by_name(
    adapters: Adapters, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    base = adapters.base("tied")
    folder = adapters.make(base, tmp_path / "x", {"target_modules": ["embed_tokens"]})
    edit(folder, **settings)
    with pytest.raises(InvalidRequestError, match=words):
        load(serve(base, {}), "x", folder)
