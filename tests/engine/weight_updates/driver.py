"""An engine in this process, driven as its loop does, for tests of weight updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, PretrainedConfig

from fastserve.engine.build import build_core
from fastserve.engine.contract import EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.settings import EngineConfig
from fastserve.engine.weight_messages import FromBytes, UpdateOptions, WeightSource, WeightUpdate

ResultT = TypeVar("ResultT")
PROMPTS = ([3, 4, 5, 6, 7], [9, 8, 7], [11] * 20)


class Serving:
    """Owns a core; collects what each request got."""

    def __init__(self, path: str | Path, *, make: Callable[[EngineConfig], EngineCore] | None = None, **settings: Any):
        # Drafts come as measured speeds say, and the last bits of logits depend on the size of a step.
        chosen: dict[str, Any] = {"max_total_tokens": 1024, "speculative_method": "off"} | settings
        config = EngineConfig(model_dir=str(path), device="cpu", dtype="float32", **chosen)
        self.core: EngineCore = build_core(config, lambda *_: None) if make is None else make(config)
        self.answers: dict[str, RequestOutput] = {}
        self._number = 0

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            known = self.answers.setdefault(output.request_id, RequestOutput(output.request_id, []))
            assert known.finish_reason is None, "nothing may follow the last output"
            known.token_ids += output.token_ids
            known.finish_reason, known.error_kind = output.finish_reason, output.error_kind
            known.weight_versions = output.weight_versions or known.weight_versions
            known.num_cached_tokens = max(known.num_cached_tokens, output.num_cached_tokens)
            if output.logprobs is not None:
                known.logprobs = (known.logprobs or []) + output.logprobs

    def add(self, prompt_ids: list[int], **params: Any) -> str:
        self._number += 1
        name = f"r{self._number}"
        request = EngineRequest(name, prompt_ids, SamplingParams(**{"max_tokens": 12, "temperature": 0.0} | params))
        refused = self.core.add(request)
        if refused is not None:
            self.take([refused])
        return name

    def abort(self, name: str) -> None:
        self.core.abort(name)
        self.core.pausing.update()

    def call(self) -> None:
        """Calls come with no step in flight."""
        self.take(self.core.drain())

    def turn(self) -> None:
        """One turn of the engine's loop."""
        self.take(self.core.update())
        if self.core.has_work:
            self.take(self.core.step())
        self.core.pausing.update()

    def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            self.turn()
            if not self.core.has_work:
                time.sleep(0.0005)
            assert time.monotonic() < deadline_s, "it never came to that"

    def wait(self, future: Future[ResultT]) -> ResultT:
        self.until(future.done)
        return future.result()

    def receive(self, source: WeightSource, **options: Any) -> Future[WeightUpdate]:
        self.call()
        return self.core.updates.receive(source, UpdateOptions(**options), self.take)

    def update(self, source: WeightSource, **options: Any) -> WeightUpdate:
        return self.wait(self.receive(source, **options))

    def run(self, name: str) -> RequestOutput:
        self.until(lambda: name in self.answers and self.answers[name].finish_reason is not None)
        return self.answers[name]

    def ask(self, prompt_ids: list[int], **params: Any) -> RequestOutput:
        return self.run(self.add(prompt_ids, **params))

    def answer_all(self) -> list[RequestOutput]:
        names = [self.add(list(prompt), logprobs=3) for prompt in PROMPTS]
        return [self.run(name) for name in names]

    def checksum(self) -> str:
        return self.core.updates.checker.checksum()


def same_answers(found: list[RequestOutput], expected: list[RequestOutput]) -> bool:
    return [(one.token_ids, one.logprobs) for one in found] == [(one.token_ids, one.logprobs) for one in expected]


def other_weights(config: PretrainedConfig, folder: Path, seed: int = 7) -> Path:
    """A checkpoint with the same shapes and other weights."""
    if not folder.exists():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def as_bytes(tensors: Mapping[str, torch.Tensor]) -> FromBytes:
    return FromBytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
