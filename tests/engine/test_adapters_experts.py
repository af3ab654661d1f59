"""Adapters that change experts and routers, in a batch: each request is answered as with its adapter merged."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from fastserve.engine.core import EngineCore
from fastserve.engine.layers.experts import Experts
from fastserve.engine.loading.assembly import Assembly
from fastserve.errors import InvalidRequestError

from .adapters import Adapters, edit, write
from .conftest import TinyModels
from .test_adapters import Merged, assert_same, load, mixture, request, run, serve
from .test_adapters_ranks import assert_same_on_two_ranks

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {
        "all": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {r"experts\.down_proj": 3}},
        "first": {"target_modules": [], "target_parameters": ["gate_up_proj", "k_proj.weight"], "r": 9},
        "router": {"target_modules": [], "target_parameters": ["gate.weight", "experts.down_proj"]},
        "none": {"target_modules": ["o_proj"]},
    },
    "mixtral": {"last": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]}},
    "gpt_oss": {
        "all": {"target_modules": ["k_proj"], "target_parameters": ["gate_up_proj", "down_proj", "router.weight"]},
    },
}  # fmt: skip
LAYERS_OF_EXPERTS = {
    "mixtral": ("block_sparse_moe", {"w1": (96, 48), "w3": (96, 48), "w2": (48, 96)}),
    "qwen3_moe": ("mlp", {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}),
}


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tiny_models, tmp_path_factory.mktemp("adapters"))


@functools.cache
def make_all(adapters: Adapters, name: str) -> dict[str, Path]:
    """Those that PEFT makes today, and those that it made with transformers 4, for some layers of some experts."""
    base = adapters.base(name)
    root = Path(base) / "adapters"
    root.mkdir()
    folders = {kind: adapters.make(base, root / kind, lora) for kind, lora in KINDS[name].items()}
    if name in LAYERS_OF_EXPERTS:
        block, layers = LAYERS_OF_EXPERTS[name]
        shapes = {
            f"model.layers.{layer}.{block}.experts.{expert}.{leaf}": shape
            for layer in (0, 2) for expert in (1, 3) for leaf, shape in layers.items()
            if expert == 1 or leaf != "up_proj"
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{block}.gate": (4, 48) for layer in range(3)}
        folders["one by one"] = write(root / "one by one", shapes, target_modules=[*layers, "gate"])
    return folders


merged_models = functools.cache(Merged)


def assert_mixture(core: EngineCore, base: str, folders: dict[str, Path], count: int, max_tokens: int = 5) -> None:
    requests = mixture(["", *folders], count, seed=6, max_tokens=max_tokens)
    merged = merged_models(base)
    for name, answer in run(core, requests).items():
        one = requests[int(name[1:])]
        assert_same(answer, merged.answer(folders.get(one.adapter), one), f"{name} {one.adapter}")


@pytest.mark.parametrize("name", KINDS)
def test_a_mixture_is_answered_as_with_each_adapter_merged(adapters: Adapters, name: str) -> None:
    base = adapters.base(name)
    folders = make_all(adapters, name)
    assert_mixture(serve(base, folders), base, folders, 2 + 2 * len(folders))


def test_products_by_torch_in_memory_of_their_own_give_the_same(adapters: Adapters) -> None:
    base = adapters.base("qwen3_moe")
    folders = make_all(adapters, "qwen3_moe")
    assert_mixture(serve(base, folders, bmm=True, no_mem_pool=True), base, folders, 6, max_tokens=2)


def test_where_the_models_own_code_computes_experts_at_once_it_stays_for_other_steps(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(Assembly, "_has_layouts", lambda *_: False)
    base = adapters.base("qwen3_moe")
    folders = make_all(adapters, "qwen3_moe")
    core = serve(base, folders)
    computed: list[int] = []
    of_experts = Experts._of_experts

    def count(*args: Any) -> Any:
        computed.append(1)
        return of_experts(*args)

    monkeypatch.setattr(Experts, "_of_experts", count)
    for adapter, expected in (("", 0), ("none", 0), ("first", 3)):
        computed.clear()
        run(core, [request("r", [5, 6, 7], 1, adapter)])
        assert len(computed) == expected, adapter
    assert_mixture(core, base, folders, 6, max_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("qwen3_moe", {}), ("qwen3_moe", {"enable_expert_parallel": True}), ("gpt_oss", {}),
])  # fmt: skip
async def test_two_ranks_answer_a_mixture_as_one_does(adapters: Adapters, name: str, options: dict[str, Any]) -> None:
    await assert_same_on_two_ranks(adapters.base(name), make_all(adapters, name), **options)


def test_rows_of_the_bare_base_keep_their_bits_beside_changed_experts(adapters: Adapters) -> None:
    base = adapters.base("qwen3_moe")
    folders = make_all(adapters, "qwen3_moe")
    found = []
    for neighbour in ("all", ""):
        core = serve(base, folders)
        bare = request("bare", list(range(2, 40)), 5, logprobs=0, prompt_logprobs=0)
        # As many rows in each step: torch's product for one row rounds another way, and routers use it.
        run(core, [request("first", [9], 1, "all")])  # so that the adapter is read
        other = request("other", [5, 6, 7], 5, neighbour, logprobs=0, min_tokens=5)
        found.append(run(core, [other, bare]))
    assert found[0]["bare"] == found[1]["bare"]
    assert found[0]["other"].logprobs != found[1]["other"].logprobs


def test_experts_that_the_base_model_does_not_have_are_refused(adapters: Adapters, tmp_path: Path) -> None:
    core = serve(adapters.base("qwen3_moe"), {})
    for path, words in (
        ("model.layers.0.mlp.experts.4.down_proj", "does not have"),
        ("model.layers.0.mlp.experts.1.other_proj", "does not have"),
        ("model.layers.3.mlp.experts.1.down_proj", "does not have"),
        ("model.layers.0.mlp.experts.1.up_proj", "have the shapes"),
    ):
        folder = write(tmp_path / path, {path: (48, 32)}, target_modules="all-linear")
        with pytest.raises(InvalidRequestError, match=words):
            load(core, "x", folder)
    folder = write(tmp_path / "y", {"transformer.h.0.attn.c_proj": (48, 48)}, target_parameters=["c_proj.weight"])
    with pytest.raises(InvalidRequestError, match=r"attn\.c_proj, .* by target_parameters"):
        load(serve(adapters.base("gpt2"), {}), "x", folder)
    folder = adapters.make(adapters.base("qwen3_moe"), tmp_path / "x", KINDS["qwen3_moe"]["first"])
    edit(folder, target_parameters=["experts.down_proj"])
    with pytest.raises(InvalidRequestError, match=r"have the shapes|does not have"):
        load(core, "x", folder)
