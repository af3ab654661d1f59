"""Memory of the KV cache and of weights that is given back to the system and taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastserve.engine.occupation import MEMORY_TAGS, MemoryState, MemoryTag
from fastserve.engine.weight_messages import FromDisk
from fastserve.errors import ConflictError, UnsupportedCapabilityError

from .driver import PROMPTS, Serving, as_bytes, same_answers

SIZE = 1024
MB = 1 << 20
CONFIG = LlamaConfig(
    hidden_size=SIZE,
    num_hidden_layers=2,
    intermediate_size=2 * SIZE,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=SIZE,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of 84 MB."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("weights")
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def serving(folders: list[Path]) -> Serving:
    return Serving(folders[0], max_total_tokens=2048)


def resident() -> int:
    size: int = psutil.Process().memory_info().rss
    return size


def release(serving: Serving, *tags: MemoryTag) -> MemoryState:
    serving.call()
    return serving.core.occupation.release(tags)


def resume(serving: Serving, *tags: MemoryTag) -> MemoryState:
    serving.call()
    state = serving.core.occupation.resume(tags, serving.take)
    return state if isinstance(state, MemoryState) else serving.wait(state)


def test_the_kv_cache_is_given_back_and_requests_wait_for_it(serving: Serving) -> None:
    before = serving.answer_all()
    for layer in serving_caches(serving):
        layer.fill_(float("nan"))  # all of its pages are there; values that no answer may see
    full = resident()
    state = release(serving, "kv_cache")
    assert (state.released, state.num_bytes > 30 * MB) == (["kv_cache"], True)
    assert full - resident() > 0.9 * state.num_bytes
    assert serving.core.stats.paused
    waiting = serving.add(list(PROMPTS[0]), logprobs=3)
    for _ in range(5):
        serving.turn()
    assert waiting not in serving.answers
    assert release(serving, "kv_cache").num_bytes == 0, "it may be repeated"
    assert resume(serving, "kv_cache").released == []
    assert same_answers([serving.run(waiting)], before[:1])
    assert serving.answers[waiting].num_cached_tokens == 0, "the prefix cache was in that memory"
    assert same_answers(serving.answer_all(), before), "kernels use the same addresses"


def serving_caches(serving: Serving) -> list[torch.Tensor]:
    memory: Any = serving.core.occupation._memory
    found: list[torch.Tensor] = memory._tensors("kv_cache")
    return found


def test_running_requests_must_end_or_be_paused_first(serving: Serving) -> None:
    expected = serving.ask([3, 4, 5], max_tokens=30).token_ids
    running = serving.add([3, 4, 5], max_tokens=30)
    serving.until(lambda: running in serving.answers)
    with pytest.raises(ConflictError, match="pause_generation"):
        release(serving, "kv_cache")
    serving.call()
    serving.core.pausing.pause("keep", serving.take)
    assert release(serving, "kv_cache").num_preempted == 1
    serving.core.pausing.resume()
    assert serving.core.stats.paused, "there is no memory yet"
    assert serving.core.pausing.pause("wait", serving.take).done()
    serving.core.pausing.resume()
    resume(serving, "kv_cache")
    assert serving.run(running).token_ids == expected


def test_weights_are_given_back_and_come_from_the_folder(serving: Serving) -> None:
    before, checksum, full = serving.answer_all(), serving.checksum(), resident()
    state = release(serving, *MEMORY_TAGS)
    assert (state.released, state.num_bytes > 100 * MB) == (["kv_cache", "weights"], True)
    assert full - resident() > 70 * MB
    assert serving.core.stats.weights_incomplete is True
    assert serving.ask([3]).error_kind == "WeightsIncompleteError"
    with pytest.raises(ConflictError, match="resume_memory_occupation"):
        serving.checksum()
    assert resume(serving, "weights").released == ["kv_cache"]
    assert serving.core.updates.problem is None
    assert resume(serving, "kv_cache").released == []
    assert serving.checksum() == checksum
    assert same_answers(serving.answer_all(), before)


def test_updates_that_bring_all_weights_bring_the_memory_back(serving: Serving, folders: list[Path]) -> None:
    before, new = serving.answer_all(), Serving(folders[1], max_total_tokens=2048)
    release(serving, "weights")
    tensors = {name: new.core.weights.get(name) for name in new.core.weights.names()}
    first, *others = tensors
    serving.update(as_bytes({first: tensors[first]}), version="new")
    with pytest.raises(Exception, match="no folder"):
        serving.update(FromDisk("/nowhere"))
    assert serving.core.occupation.released == ["weights"]
    serving.update(as_bytes({name: tensors[name] for name in others}), version="new")
    assert serving.core.occupation.released == ["weights"], "the failure may have left anything"
    serving.update(as_bytes({first: tensors[first]}), version="new")
    assert serving.core.occupation.released == []
    assert serving.checksum() == new.checksum()
    assert serving.ask([3]).weight_versions == ("new",)
    assert not same_answers(serving.answer_all(), before)
    assert same_answers(serving.answer_all(), new.answer_all())
    serving.update(FromDisk(str(folders[0])), version="default")


def test_memory_that_cannot_be_given_back_is_refused_by_name(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = serving.core.occupation._memory
    monkeypatch.setitem(memory._refusals, "weights", "they are packed.")
    with pytest.raises(UnsupportedCapabilityError, match="weights: they are packed"):
        release(serving, *MEMORY_TAGS)
    assert serving.core.occupation.released == []
