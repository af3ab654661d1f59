"""Adapters in a batch: each request is answered as by the model with its adapter merged."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastserve.engine.adapters import reading
from fastserve.engine.adapters.manager import AdapterManager
from fastserve.engine.contract import EngineRequest, RequestOutput, SamplingParams
from fastserve.engine.core import EngineCore
from fastserve.engine.loading.lora.settings import read_settings
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.settings import AdapterOptions, WeightOptions
from fastserve.errors import ConflictError, FastserveError, InvalidRequestError, ModelNotFoundError

from .conftest import TinyModels, keep_way, plain
from .test_engine_equality import make_core

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANKS = (4, 64, 8, 5, 32, 16, 12, 24)
TOLERANCE = 1e-4


def make_adapter(base: str, folder: Path, rank: int, layers: Sequence[str] = LAYERS, **settings: Any) -> Path:
    """An adapter with random values, different for each folder, for all layers of these names."""
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)) * 31 + rank)
    tensors = {}
    for path, module in plain(base).named_modules():
        if path.rpartition(".")[2] in layers:
            shape = tuple(module.weight.shape)
            out, width = shape if isinstance(module, torch.nn.Linear) else shape[::-1]
            parts = ("lora_A.weight", "lora_B.weight")
            if isinstance(module, torch.nn.Embedding):
                parts = ("lora_embedding_A", "lora_embedding_B")
            for part, size in zip(parts, ((rank, width), (out, rank)), strict=True):
                tensors[f"base_model.model.{path}.{part}"] = torch.randn(size, generator=generator) * 0.2
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "x",
        "target_modules": list(layers), **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters of different ranks; of some, only for a few layers."""
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_models.path("llama")
    found = {}
    for index, rank in enumerate(RANKS):
        layers = LAYERS if index % 3 else ("q_proj", "v_proj", "down_proj")
        found[f"a{index}"] = make_adapter(base, root / f"a{index}", rank, layers, use_rslora=index == 2)
    return found


def serve(base: str, folders: dict[str, Path], *, settings: dict[str, Any] | None = None, **options: Any) -> EngineCore:
    modules = tuple((name, str(folder)) for name, folder in folders.items())
    return make_core(base, adapters=AdapterOptions(modules=modules, **options), **(settings or {}))


def manager(core: EngineCore) -> AdapterManager:
    assert isinstance(core.adapters, AdapterManager)
    return core.adapters


def request(name: str, prompt: list[int], max_tokens: int, adapter: str = "", **params: Any) -> EngineRequest:
    return EngineRequest(name, prompt, SamplingParams(max_tokens, temperature=0.0, **params), adapter=adapter)


@dataclasses.dataclass
class Answer:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    error_kind: str | None = None
    num_cached: int = 0


def step(core: EngineCore, answers: dict[str, Answer]) -> None:
    for output in core.step():
        take(output, answers)
    core.scheduler.check()
    if isinstance(core.adapters, AdapterManager):
        core.adapters.check()


def take(output: RequestOutput, answers: dict[str, Answer]) -> None:
    answer = answers[output.request_id]
    answer.token_ids += output.token_ids
    answer.logprobs += [item.logprob for item in output.logprobs or ()]
    answer.prompt_logprobs += [item.logprob for item in output.prompt_logprobs or ()]
    answer.finish_reason, answer.error, answer.error_kind = output.finish_reason, output.error, output.error_kind
    answer.num_cached = max(answer.num_cached, output.num_cached_tokens)


def run(core: EngineCore, requests: Sequence[EngineRequest]) -> dict[str, Answer]:
    answers = {one.request_id: Answer() for one in requests}
    for one in requests:
        refused = core.add(one)
        if refused is not None:
            take(refused, answers)
    for _ in range(20_000):
        if not core.has_work:
            return answers
        step(core, answers)
    raise AssertionError("the engine did not finish")


class Merged:
    """Answers of models with an adapter merged by our own loader."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._cores: dict[str, EngineCore] = {}

    def answer(self, folder: Path | None, one: EngineRequest) -> Answer:
        key = str(folder)
        if key not in self._cores:
            weights = WeightOptions(adapter_dir=None if folder is None else key)
            self._cores[key] = make_core(self._base, weights=weights, speculative_method="off", no_prefix_cache=True)
        bare = EngineRequest(one.request_id, one.prompt_ids, one.params)
        return run(self._cores[key], [bare])[one.request_id]


@pytest.fixture(scope="module")
def merged(tiny_models: TinyModels) -> Merged:
    return Merged(tiny_models.path("llama"))


def mixture(names: Sequence[str], count: int, seed: int, max_tokens: int = 12) -> list[EngineRequest]:
    chosen = random.Random(seed)
    shared = [chosen.randrange(2, 160) for _ in range(33)]
    return [
        request(
            f"r{index}",
            shared[: chosen.choice((0, 0, 17, 33))]
            + [chosen.randrange(2, 160) for _ in range(chosen.randrange(1, 30))],
            max_tokens,
            names[index % len(names)],
            logprobs=0,
            prompt_logprobs=0 if index % 5 == 0 else None,
        )
        for index in range(count)
    ]


def assert_same(found: Answer, expected: Answer, what: str) -> None:
    assert found.error is None, what
    assert found.token_ids == expected.token_ids, what
    assert found.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE), what
    assert found.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=TOLERANCE), what


@pytest.mark.parametrize(
    "options",
    [{}, {"no_mem_pool": True}, {"bmm": True}, {"no_lora_swap": True}, {"prefetch": False}],
    ids=["paged", "own memory", "padded", "stay", "no prefetch"],
)
def test_each_request_of_a_mixture_is_answered_as_with_its_adapter_merged(
    tiny_models: TinyModels, folders: dict[str, Path], merged: Merged, options: dict[str, Any]
) -> None:
    core = serve(tiny_models.path("llama"), folders, settings={"max_total_tokens": 16 * 600}, **options)
    requests = mixture(["", *folders], 24 if not options else 9, seed=1)
    for name, answer in run(core, requests).items():
        one = requests[int(name[1:])]
        assert_same(answer, merged.answer(folders.get(one.adapter), one), f"{name} {one.adapter}")


def test_rows_of_the_bare_base_are_bit_equal_to_those_without_adapters(
    tiny_models: TinyModels, folders: dict[str, Path]
) -> None:
    requests = mixture(["", "a0", "a1"], 9, seed=2)
    found = []
    for core in (serve(tiny_models.path("llama"), folders), make_core(tiny_models.path("llama"))):
        assert isinstance(core._executor, ModelRunner)
        keep_way(core._executor, "modules")
        bare = isinstance(core.adapters, AdapterManager)
        todo = requests if bare else [without_adapter(one) for one in requests]
        found.append(run(core, todo))
    for one in requests:
        mixed, alone = (answers[one.request_id] for answers in found)
        assert (mixed.logprobs == alone.logprobs) == (not one.adapter), one.adapter
        assert (mixed.prompt_logprobs == alone.prompt_logprobs) or one.adapter


def without_adapter(one: EngineRequest) -> EngineRequest:
    return EngineRequest(one.request_id, one.prompt_ids, one.params)


@pytest.mark.parametrize("overlap", [False, True])
def test_random_histories_with_few_blocks_give_the_same_answers(
    tiny_models: TinyModels, folders: dict[str, Path], merged: Merged, overlap: bool
) -> None:
    """Preemption, prefix hits, aborts, eviction, and fewer adapters in a step than are asked for."""
    few = {name: folders[name] for name in ("a0", "a2", "a3", "a5", "a6")}
    core = serve(
        tiny_models.path("llama"), few, max_loras=2, max_cpu_loras=2,
        settings={"max_total_tokens": 16 * 80, "overlap": overlap},
    )  # fmt: skip
    requests = mixture(["", *few], 30, seed=3)
    answers = {one.request_id: Answer() for one in requests}
    chosen = random.Random(4)
    aborted = set()
    todo = list(requests)
    for _ in range(20_000):
        if todo and chosen.random() < 0.5:
            one = todo.pop(0)
            assert core.add(one) is None
            if chosen.random() < 0.2:
                aborted.add(one.request_id)
        if aborted and chosen.random() < 0.2:
            core.abort(chosen.choice(sorted(aborted)))
        if not core.has_work and not todo:
            break
        step(core, answers)
    for one in requests:
        if one.request_id not in aborted:
            assert_same(answers[one.request_id], merged.answer(few.get(one.adapter), one), one.request_id)
    for name in few:  # two of them at most are still there, however fast the steps were
        run(core, [request(f"again-{name}", [5, 6], 1, name)])
    infos = {info.name: info for info in manager(core).infos()}
    assert sum(info.loads for info in infos.values()) > len(few), "adapters were evicted and came back"
    assert all(info.num_running == 0 for info in infos.values())


def test_an_adapter_loaded_again_with_other_weights_never_meets_the_old_cache(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models.path("llama")
    core = serve(base, {})
    one = request("r", list(range(2, 60)), 6, "x", logprobs=0)
    seen = []
    for rank in (4, 7):
        folder = make_adapter(base, tmp_path / f"x{rank}", rank)
        load(core, "x", folder, replace=rank == 7)
        first, second = (run(core, [one])["r"] for _ in range(2))
        assert (first.num_cached, second.num_cached) == (0, 48)
        assert first.logprobs == pytest.approx(second.logprobs, abs=TOLERANCE)
        assert_same(first, Merged(base).answer(folder, one), f"rank {rank}")
        seen.append(first.logprobs)
    assert seen[0] != pytest.approx(seen[1], abs=1e-2)
    assert len(core.scheduler.pool._roots) <= 4, "roots of the replaced adapter are forgotten"


def load(core: EngineCore, name: str, folder: Path, *, replace: bool = False) -> Any:
    done = core.adapters.load(name, str(folder), replace=replace)
    while not done.done():
        core.adapters.wait(1.0)
        core.adapters.update()
    return done.result()


def test_unloading_waits_for_users_and_refuses_new_requests(
    tiny_models: TinyModels, folders: dict[str, Path], merged: Merged
) -> None:
    core = serve(tiny_models.path("llama"), folders)
    one = request("r", [5, 6, 7], 10, "a0", logprobs=0)
    answers = {"r": Answer()}
    assert core.add(one) is None
    while not answers["r"].token_ids:
        step(core, answers)
    done = core.adapters.unload("a0")
    refused = core.add(request("late", [5], 3, "a0"))
    assert refused is not None
    assert (refused.error_kind, refused.error) == ("ModelNotFoundError", "The adapter a0 is being unloaded.")
    assert not done.done()
    while core.has_work:
        step(core, answers)
    core.adapters.update()
    assert done.result().name == "a0"
    assert_same(answers["r"], merged.answer(folders["a0"], one), "r")
    assert core.scheduler.pool.num_free == core.scheduler.pool.num_blocks
    with pytest.raises(ModelNotFoundError, match="There is no adapter a0; there are: a1, a2"):
        core.adapters.unload("a0")
    assert load(core, "a0", folders["a0"]).location == "host"
    with pytest.raises(ConflictError, match="already"):
        load(core, "a0", folders["a0"])


def test_an_unknown_adapter_is_an_error_that_lists_the_known_ones_and_never_the_base(
    tiny_models: TinyModels, folders: dict[str, Path]
) -> None:
    core = serve(tiny_models.path("llama"), {"a0": folders["a0"]})
    answer = run(core, [request("r", [5], 3, "wrong\n")])["r"]
    assert answer.error_kind == "ModelNotFoundError"
    assert answer.error == "There is no adapter wrong\\n; there are: a0."
    assert not answer.token_ids
    without = run(make_core(tiny_models.path("llama")), [request("r", [5], 3, "a0")])["r"]
    assert (without.error_kind, without.token_ids) == ("ModelNotFoundError", [])


def test_a_request_that_never_fits_with_its_adapter_is_refused_at_once_and_blocks_nobody(
    tiny_models: TinyModels, folders: dict[str, Path]
) -> None:
    core = serve(tiny_models.path("llama"), folders, settings={"max_total_tokens": 16 * 100})
    answers = run(core, [request("big", [5], 3, "a1"), request("next", [5], 3, "a0")])
    assert answers["big"].error_kind == "InvalidRequestError"
    assert "the adapter a1 together need" in str(answers["big"].error)
    assert len(answers["next"].token_ids) == 3


@pytest.mark.parametrize("is_last", [False, True])
def test_an_answer_ends_where_the_kv_cache_beside_its_adapter_does(
    tiny_models: TinyModels, folders: dict[str, Path], merged: Merged, is_last: bool
) -> None:
    """A chat without max_tokens may fill the context, which the adapter then may not leave free. `is_last`: the prompt
    leaves room for one token."""
    folder = folders["a0"]
    base = tiny_models.path("llama")
    needed = manager(serve(base, {"a0": folder})).find("a0")
    assert needed is not None
    num_blocks = needed.shape.num_blocks + 5
    core = serve(base, {"a0": folder}, settings={"max_total_tokens": 16 * num_blocks, "max_model_len": 16 * num_blocks})
    prompt = [5 + index % 90 for index in range(79 if is_last else 9)]
    limit = 16 * num_blocks - len(prompt)
    one = request("r", prompt, limit, "a0", logprobs=0, min_tokens=limit)
    answer = run(core, [one, request("bare", [5], 3)])["r"]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 80 - len(prompt))
    assert_same(answer, merged.answer(folder, request("r", prompt, 80 - len(prompt), logprobs=0)), "r")
    refused = core.add(request("full", [5] * 80, 1, "a0"))
    assert refused is not None
    assert (refused.error_kind, refused.finish_reason) == ("InvalidRequestError", "error")
    assert "shorten the prompt" in str(refused.error)


def test_settings_are_checked_once_for_adapters_that_differ_in_values_alone(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models.path("llama")
    folders = {name: make_adapter(base, tmp_path / name, 6) for name in ("x", "y")}
    folders["scaled"] = make_adapter(base, tmp_path / "scaled", 6, lora_alpha=9)
    folders["few"] = make_adapter(base, tmp_path / "few", 6, LAYERS[:2])
    checked = []

    def count(file: Path) -> Any:
        checked.append(file.parent.name)
        return read_settings(file)

    monkeypatch.setattr(reading, "read_settings", count)
    alone = {name: read(serve(base, {name: folder}), name) for name, folder in folders.items()}
    assert checked == list(folders)
    core = serve(base, folders)
    for name, expected in alone.items():
        found = read(core, name)
        assert torch.equal(found.tiles, expected.tiles), name
        assert found.first_tile.tolist() == expected.first_tile.tolist(), name
        assert found.rank_groups.tolist() == expected.rank_groups.tolist(), name
    assert not torch.equal(alone["x"].tiles, alone["y"].tiles)
    assert checked[4:] == ["x", "scaled", "few"]


def read(core: EngineCore, name: str) -> reading.HostAdapter:
    adapter = manager(core).find(name)
    assert adapter is not None
    [part] = manager(core)._store.read(adapter.path, adapter.shape)
    assert isinstance(part, reading.HostAdapter)
    return part


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_an_adapter_that_cannot_be_read_any_more_fails_its_requests_alone(
    tiny_models: TinyModels, folders: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    base = tiny_models.path("llama")
    folder = make_adapter(base, tmp_path / "x", 4)
    core = serve(base, {"x": folder, "a0": folders["a0"]})
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        make_adapter(base, folder, 6)
    answers = run(core, [request("r", [5], 3, "x"), request("other", [5], 3, "a0"), request("bare", [5], 3)])
    assert answers["r"].error_kind == "InvalidRequestError"
    assert "were changed or removed since it was loaded" in str(answers["r"].error)
    assert len(answers["other"].token_ids) == len(answers["bare"].token_ids) == 3


def test_drafts_are_the_same_answers(tiny_models: TinyModels, folders: dict[str, Path], merged: Merged) -> None:
    core = serve(tiny_models.path("llama"), folders, settings={"speculative_method": "ngram"})
    requests = [request(f"r{name}", [5, 6, 7] * 12, 20, name, logprobs=0) for name in ("", "a0", "a2")]
    for one in requests:
        answer = run(core, [one])[one.request_id]
        assert_same(answer, merged.answer(folders.get(one.adapter), one), one.adapter)


def test_without_compute_all_answers_are_those_of_the_base(
    tiny_models: TinyModels, folders: dict[str, Path], merged: Merged
) -> None:
    core = serve(tiny_models.path("llama"), folders, no_lora_compute=True)
    one = request("r", [5, 6, 7], 6, "a0", logprobs=0)
    assert_same(run(core, [one])["r"], merged.answer(None, one), "r")
    assert manager(core).infos()[0].location == "device"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", ("c_attn", "c_fc")),
        ("phi3", ("qkv_proj", "gate_up_proj", "o_proj")),
        ("qwen3_moe", ("q_proj", "o_proj")),
        ("gemma2", LAYERS),
        ("opt", ("q_proj", "fc1", "fc2")),
        ("mistral", LAYERS),
    ],
)
def test_layers_of_other_architectures_are_targets(
    tiny_models: TinyModels, tmp_path: Path, name: str, layers: tuple[str, ...]
) -> None:
    base = tiny_models.path(name)
    folder = make_adapter(base, tmp_path / "x", 6, layers)
    core, of_base = serve(base, {"x": folder}), Merged(base)
    one = request("r", list(range(2, 30)), 6, "x", logprobs=0)
    answer = run(core, [one, request("bare", [7, 8], 4)])["r"]
    assert_same(answer, of_base.answer(folder, one), name)
    assert answer.logprobs != pytest.approx(of_base.answer(None, one).logprobs, abs=1e-2)


def test_a_step_is_one_forward_pass_for_any_mixture(
    tiny_models: TinyModels, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_total_tokens": 16 * 600, "speculative_method": "off", "no_prefix_cache": True}
    core = serve(tiny_models.path("llama"), folders, settings=settings)
    requests = [request(f"r{index}", [5, 6, 7], 4, name) for index, name in enumerate(("a0", "a1", "", "a0"))]
    run(core, requests)  # the adapters are read
    assert isinstance(core._executor, ModelRunner)
    counts: list[int] = []
    for way in core._executor.forward_passes.ways:
        monkeypatch.setattr(type(way), "__call__", counting(counts, type(way).__call__))
    assert all(len(answer.token_ids) == 4 for answer in run(core, requests).values())
    assert counts == [12, 4, 4, 4]


def counting(counts: list[int], forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, step: PackedStep) -> Any:
        counts.append(len(step.input_ids))
        return forward(self, step)

    return call


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_grows_by_the_bounds_and_no_more(tiny_models: TinyModels, folders: dict[str, Path], count: int) -> None:
    """Many registered adapters: copies in host memory and blocks are bounded."""
    many = {f"n{index}": folders["a0"] for index in range(count)}
    core = serve(tiny_models.path("llama"), many, max_loras=4, max_cpu_loras=5, settings={"max_total_tokens": 16 * 60})
    requests = [request(f"r{index}", [5 + index % 7], 2, f"n{index}") for index in range(0, count, 4)]
    answers = run(core, requests)
    assert all(len(answer.token_ids) == 2 for answer in answers.values())
    infos = manager(core).infos()
    assert len(infos) == count
    stats = core.stats.adapters
    assert stats is not None
    assert (stats.num_adapters, stats.num_on_host, stats.num_running) == (count, 5, 0)
    assert stats.evictions == stats.loads - stats.num_on_device > 0
    held = sum(len(blocks) for blocks in manager(core).held_blocks)
    assert held == core.scheduler.pool.num_blocks - core.scheduler.pool.num_free


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_modules": ["q_proj"]}, "not for model.layers.0.mlp.down_proj"),
    ({"r": 8}, "shapes"),
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"unknown_field": 7}, "unknown_field"),
]


@pytest.fixture(scope="module")
def small_core(tiny_models: TinyModels) -> EngineCore:
    return serve(tiny_models.path("llama"), {}, max_lora_rank=8)


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_applied_in_a_batch_is_refused_by_name(
    tiny_models: TinyModels, small_core: EngineCore, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    folder = make_adapter(tiny_models.path("llama"), tmp_path / "x", 4, **settings)
    with pytest.raises(InvalidRequestError, match=words):
        load(small_core, "x", folder)
    assert small_core.adapters.infos() == []


@pytest.mark.parametrize(
    ("base", "rank", "layers", "words"),
    [
        ("gpt2", 4, ("wpe",), "changes transformer.wpe, which the base model does not have"),
        ("llama", 9, ("q_proj",), "rank 9 .* at most 8 is served; raise --max-lora-rank"),
        ("gpt2", 4, ("c_attn",), "which the base model does not have"),
        ("qwen3", 4, ("q_proj",), "have the shapes"),
    ],
)
def test_adapters_of_other_layers_ranks_and_models_are_refused(
    tiny_models: TinyModels, small_core: EngineCore, tmp_path: Path, base: str, rank: int, layers: tuple[str, ...],
    words: str,
) -> None:  # fmt: skip
    folder = make_adapter(tiny_models.path(base), tmp_path / "x", rank, layers)
    with pytest.raises(InvalidRequestError, match=words):
        load(small_core, "x", folder)


def test_an_adapter_at_start_that_cannot_be_served_ends_the_start(tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(FastserveError, match=r"adapter_config\.json"):
        serve(tiny_models.path("llama"), {"x": tmp_path / "nothing"})
