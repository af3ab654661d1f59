"""Random histories of updates, pauses, requests and aborts on a real engine: no deadlock, no lost request, and no token
that other weights than those of its version computed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastserve.engine.pausing import PauseMode
from fastserve.engine.weight_messages import FromBytes, FromDisk, UpdateMode, UpdateOptions, WeightSource, WeightUpdate
from fastserve.errors import ConflictError, FastserveError, InvalidRequestError, WeightsIncompleteError
from tests.engine.conftest import CONFIGS, TinyModels

from .driver import Serving, as_bytes, other_weights

MODES: tuple[UpdateMode, ...] = ("drain", "retract", "abort", "in_place")
PAUSES: tuple[PauseMode, ...] = ("keep", "wait", "abort")


class Weights:
    """Two sets of weights, which answer with ids of one half of the vocabulary each, and how to send them."""

    def __init__(self, folder: Path) -> None:
        self.folders = {}
        self.models: dict[str, PreTrainedModel] = {}
        self.sources: dict[str, WeightSource] = {}
        for seed, name in enumerate("AB"):
            path = other_weights(CONFIGS["llama"], folder / name, seed)
            tensors = load_file(path / "model.safetensors")
            half = slice(80, 160) if name == "A" else slice(0, 80)
            tensors["lm_head.weight"][half] = 0
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            self.folders[name] = path
            self.models[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.sources[name] = as_bytes(tensors)
        broken = folder / "broken"
        broken.mkdir()
        del tensors["model.norm.weight"]
        save_file(tensors, broken / "model.safetensors")
        self.broken = FromDisk(str(broken))
        """It fails once all that it has is received."""
        self._greedy: dict[tuple[str, tuple[int, ...]], int] = {}

    def next_token(self, name: str, token_ids: list[int]) -> int:
        key = (name, tuple(token_ids))
        if key not in self._greedy:
            with torch.inference_mode():
                logits = self.models[name](input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
            for length in range(1, len(token_ids) + 1):
                self._greedy[name, tuple(token_ids[:length])] = int(logits[length - 1].argmax())
        return self._greedy[key]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def serving(weights: Weights) -> Serving:
    made = Serving(weights.folders["A"], max_num_seqs=3)
    made.core.updates.set_version("A")
    return made


class History:
    has_room = True
    """Whether there is memory for a second copy of the weights."""

    def __init__(self, serving: Serving, weights: Weights, seed: int) -> None:
        self.serving = serving
        self.weights = weights
        self.random = random.Random(seed)
        self.prompts: dict[str, list[int]] = {}
        self.left: set[str] = set()
        self.keeps_old_cache = seed % 2 == 1
        """Whether requests may go on with keys and values of weights before, as they do when they are frozen."""
        self.updates: list[tuple[str, Future[WeightUpdate]]] = []
        self.pauses: list[Future[Any]] = []
        receiver: Any = serving.core.updates._receiver
        receiver._has_room = lambda num_bytes: self.has_room
        serving.answers.clear()

    def run(self, num_actions: int) -> None:
        actions: list[Callable[[], None]] = [self.ask, self.ask, self.turn, self.turn, self.turn, self.leave]
        actions += [self.update, self.update, self.session, self.fail, self.reset]
        if self.keeps_old_cache:
            actions += [self.pause, self.resume]
        for _ in range(num_actions):
            self.random.choice(actions)()
            self.serving.core.scheduler.check()
        self.end()
        self.has_room = True

    def ask(self) -> None:
        prompt = [self.random.randrange(2, 160) for _ in range(self.random.randrange(1, 40))]
        name = self.serving.add(prompt, max_tokens=self.random.randrange(1, 9))
        self.prompts[name] = prompt

    def turn(self) -> None:
        for _ in range(self.random.randrange(1, 5)):
            self.serving.turn()

    def leave(self) -> None:
        if self.prompts:
            name = self.random.choice(list(self.prompts))
            self.serving.abort(name)
            self.left.add(name)

    def update(self) -> None:
        self.begin(self.random.choice("AB"))

    def begin(self, name: str, source: WeightSource | None = None) -> None:
        self.has_room = self.random.random() > 0.3
        mode = self.random.choice(MODES[: 4 if self.keeps_old_cache else 3])
        is_busy = self.serving.core.updates._current is not None
        try:
            reply = self.serving.receive(source or self.weights.sources[name], mode=mode, version=name)
        except ConflictError:
            assert is_busy
            return
        assert not is_busy
        self.updates.append((name, reply))

    def session(self) -> None:
        """One set in two transfers."""
        updates, name, serving = self.serving.core.updates, self.random.choice("AB"), self.serving
        serving.call()
        if updates._current is not None:
            with pytest.raises(ConflictError):
                updates.start(UpdateOptions(), serving.take)
            return
        mode = self.random.choice(MODES[: 4 if self.keeps_old_cache else 3])
        self.has_room = self.random.random() > 0.3
        updates.start(UpdateOptions(mode, name), serving.take)
        tensors = list(load_file(self.weights.folders[name] / "model.safetensors").items())
        for part in (tensors[:9], tensors[9:]):
            self.has_room = self.random.random() > 0.3
            serving.call()
            received = updates.receive(as_bytes(dict(part)), UpdateOptions(), serving.take, is_part=True)
            serving.wait(received)
        serving.call()
        self.updates.append((name, updates.finish(serving.take)))

    def fail(self) -> None:
        bad: WeightSource = FromBytes(b"no safetensors file")
        self.begin("bad", self.random.choice([bad, self.weights.broken]))

    def pause(self) -> None:
        self.serving.call()
        self.pauses.append(self.serving.core.pausing.pause(self.random.choice(PAUSES), self.serving.take))

    def resume(self) -> None:
        self.serving.call()
        self.serving.core.pausing.resume()

    def reset(self) -> None:
        self.serving.call()
        self.serving.core.scheduler.reset_prefix_cache(reset_running_requests=self.random.random() < 0.5)

    def end(self) -> None:
        serving, core = self.serving, self.serving.core
        self.resume()
        serving.until(lambda: all(reply.done() for _, reply in self.updates))
        serving.until(lambda: not core.scheduler.num_requests)
        assert all(paused.done() for paused in self.pauses)
        for name, reply in self.updates:
            if name == "bad":
                assert isinstance(reply.exception(), InvalidRequestError)
            else:
                assert reply.result().weight_version == name
        core.scheduler.check()
        assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks
        for name, prompt in self.prompts.items():
            self.check_answer(name, prompt)
        if core.updates.problem is not None:
            assert serving.ask([3]).error_kind == WeightsIncompleteError.__name__
        serving.update(self.weights.sources["A"], version="A")
        assert core.updates.problem is None
        assert serving.ask([3]).weight_versions == ("A",)

    def check_answer(self, name: str, prompt: list[int]) -> None:
        answer = self.serving.answers.get(name)
        if answer is None or answer.finish_reason is None:
            assert name in self.left
        elif answer.finish_reason == "error":
            assert answer.error_kind == WeightsIncompleteError.__name__
        classes = [] if answer is None else ["A" if token_id < 80 else "B" for token_id in answer.token_ids]
        if answer is not None and answer.finish_reason in ("stop", "length"):
            assert [one for one, _ in itertools.groupby(answer.weight_versions)] == [
                one for one, _ in itertools.groupby(classes)
            ]
        if not self.keeps_old_cache:
            for at, one in enumerate(classes):  # the KV cache is of the same weights, too
                assert answer is not None
                assert answer.token_ids[at] == self.weights.next_token(one, prompt + answer.token_ids[:at])


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 1030), marks=pytest.mark.slow)])
def test_no_history_loses_a_request_or_mixes_weights(serving: Serving, weights: Weights, seeds: range) -> None:
    for seed in seeds:
        History(serving, weights, seed).run(num_actions=30)


def test_modes_treat_running_requests_as_they_say(serving: Serving, weights: Weights) -> None:
    serving.update(weights.sources["A"], version="A")
    for mode, expected in (
        ("drain", ("length", ("A",))),
        ("retract", ("length", ("A", "B"))),
        ("in_place", ("length", ("A", "B"))),
        ("abort", ("abort", ("A",))),
    ):
        begun = serving.add([3, 4, 5], max_tokens=200)
        serving.until(lambda begun=begun: begun in serving.answers)  # type: ignore[misc]
        reply = serving.receive(weights.sources["B"], mode=mode, version="B")
        serving.until(lambda: serving.core.pausing._num_holds or reply.done())  # noqa: B023
        later = serving.add([3, 4, 5], max_tokens=30)
        done = serving.wait(reply)
        assert (serving.run(begun).finish_reason, serving.answers[begun].weight_versions) == expected
        assert done.num_aborted == (mode == "abort")
        assert done.num_preempted == (mode == "retract")
        assert serving.run(later).weight_versions == ("B",)
        assert serving.answers[later].num_cached_tokens == 0, "the prefix cache knows nothing of before"
        assert min(serving.answers[later].token_ids) >= 80
        serving.update(weights.sources["A"], version="A")


def test_blocks_that_a_request_fills_after_an_update_are_never_found(serving: Serving, weights: Weights) -> None:
    """It goes on with keys and values of the old weights, which no other request may use."""
    serving.update(weights.sources["A"], version="A")
    prompt = list(range(2, 50))
    begun = serving.add(prompt, max_tokens=150)
    serving.until(lambda: begun in serving.answers)
    serving.update(weights.sources["B"], mode="in_place", version="B")
    whole = prompt + serving.run(begun).token_ids
    assert serving.ask(whole, max_tokens=2).num_cached_tokens == 0
    assert serving.ask(whole, max_tokens=2).num_cached_tokens > 0
    assert serving.answers[begun].weight_versions == ("A", "B")


def test_an_update_of_a_paused_engine_happens_at_once(serving: Serving, weights: Weights) -> None:
    begun = serving.add([3, 4, 5], max_tokens=30)
    serving.until(lambda: begun in serving.answers)
    serving.call()
    serving.core.pausing.pause("keep", serving.take)
    assert serving.update(weights.sources["B"], version="B").success
    assert serving.core.stats.paused
    assert serving.answers[begun].finish_reason is None
    serving.core.pausing.resume()
    assert serving.run(begun).weight_versions[-1] == "B"


def test_without_memory_for_a_copy_a_failure_refuses_requests_until_a_whole_set_has_come(
    serving: Serving, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.update(weights.sources["A"], version="A")
    receiver: Any = serving.core.updates._receiver
    monkeypatch.setattr(receiver, "_has_room", lambda num_bytes: False)
    running = serving.add([3, 4, 5], max_tokens=9)
    with pytest.raises(FastserveError, match=r"has no model\.norm\.weight"):
        serving.update(weights.broken)
    assert serving.run(running).weight_versions == ("A",), "it had ended before the weights were touched"
    assert serving.core.stats.weights_incomplete
    assert serving.ask([3, 4]).error_kind == "WeightsIncompleteError"
    serving.update(as_bytes({"model.norm.weight": torch.ones(48)}))
    assert serving.ask([3, 4]).error_kind == "WeightsIncompleteError", "it was not a whole set"
    serving.update(weights.sources["B"], version="B")
    assert serving.ask([3, 4], max_tokens=1).token_ids == [weights.next_token("B", [3, 4])]


def test_parts_are_put_in_place_together(serving: Serving, weights: Weights, tiny_models: TinyModels) -> None:
    serving.update(weights.sources["A"], version="A")
    before, updates = serving.checksum(), serving.core.updates
    with pytest.raises(ConflictError, match="start_weight_update"):
        updates.finish(serving.take)
    updates.start(UpdateOptions(version="B"), serving.take)
    tensors = load_file(weights.folders["B"] / "model.safetensors")
    for name in list(tensors):
        part = as_bytes({name: tensors[name]})
        assert serving.wait(updates.receive(part, UpdateOptions(), serving.take, is_part=True)).message == "received"
    assert serving.checksum() == before
    with pytest.raises(ConflictError, match="has not been finished"):
        serving.update(weights.sources["A"])
    reply = serving.wait(updates.finish(serving.take))
    assert (reply.tensors, reply.weight_version) == (len(tensors), "B")
    assert serving.checksum() == Serving(weights.folders["B"]).checksum()
