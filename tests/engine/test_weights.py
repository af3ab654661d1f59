"""Every weight of every architecture can be read and replaced by its Hugging Face name, packed or not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastserve.demo import demo_model_path
from fastserve.engine.kernels.build import work_alone, work_is_shared
from fastserve.engine.layers.layouts.find import layout_of
from fastserve.engine.layers.layouts.onednn import OneDnnWeight
from fastserve.engine.layers.layouts.packed import GroupedWeight
from fastserve.engine.layers.layouts.plain import PlainWeight
from fastserve.engine.layers.linear import Linear, TiedEmbedding
from fastserve.engine.loading.loader import LoadedModel, load_model

from .conftest import CONFIGS, TinyModels, logits_of


def load(path: str, dtype: str = "float32") -> LoadedModel:
    return load_model(path, "cpu", dtype, trust_remote_code=False, progress=lambda *_: None)


def linears(loaded: LoadedModel) -> list[Linear]:
    return [module for module in loaded.model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*CONFIGS, "demo"])
def test_round_trip_by_name(tiny_models: TinyModels, name: str, dtype: str) -> None:
    path = demo_model_path() if name == "demo" else tiny_models.path(name)
    expected = dict(
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).named_parameters(remove_duplicate=False)
    )
    loaded = load(path, dtype)
    assert linears(loaded)
    assert set(loaded.weights.names()) == set(expected)
    assert loaded.weights.num_parameters == sum({id(p): p.numel() for p in expected.values()}.values())
    generator = torch.Generator().manual_seed(1)
    for weight_name, weight in expected.items():
        assert torch.equal(loaded.weights.get(weight_name), weight)
    for weight_name, weight in expected.items():
        fresh = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        loaded.weights.set(weight_name, fresh)
        assert torch.equal(loaded.weights.get(weight_name), fresh)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_replaced_weights_are_the_ones_that_compute(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    """Setting all weights to those of another model gives that model's logits, ties and transposed layers included."""
    torch.manual_seed(99)
    other = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    loaded = load(tiny_models.path(name))
    for weight_name, weight in other.named_parameters():
        loaded.weights.set(weight_name, weight)
    other.set_attn_implementation("eager")
    tokens = torch.randint(2, 160, (1, 17))
    with torch.inference_mode():
        expected = other(input_ids=tokens, use_cache=False).logits[0]
    found = logits_of(loaded, tokens[0].tolist())
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def test_wrong_names_and_shapes_are_refused(tiny_models: TinyModels) -> None:
    weights = load(tiny_models.path("llama")).weights
    with pytest.raises(KeyError, match="no weight 'nothing'"):
        weights.get("nothing")
    name = "model.layers.0.mlp.up_proj.weight"
    before = weights.get(name).clone()
    with pytest.raises(ValueError, match=r"\(96, 48\), not \(48, 96\)"):
        weights.set(name, torch.zeros(48, 96))
    assert torch.equal(weights.get(name), before)


def test_weights_are_packed_where_that_is_possible(tiny_models: TinyModels) -> None:
    loaded = load(tiny_models.path("qwen2"))
    layouts = {type(linear.layout) for linear in linears(loaded)}
    assert layouts == {GroupedWeight}
    assert len(loaded.attention.shapes) == 3


def test_a_delta_is_added_to_the_product() -> None:
    weight = torch.randn(6, 4)
    linear = Linear(OneDnnWeight(weight), None)
    x = torch.randn(1, 5, 4)
    plain = linear(x)
    linear.delta = lambda rows, out: out.add_(2.0)
    assert torch.allclose(linear(x), plain + 2.0)
    assert torch.allclose(plain, x @ weight.t(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_embedding_is_kept_once(tiny_models: TinyModels, dtype: str) -> None:
    model = load(tiny_models.path("gemma2"), dtype).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, TiedEmbedding)
    assert isinstance(head, Linear)
    assert embedding.layout is head.layout
    ids = torch.tensor([[3, 159, 0]])
    like = AutoModelForCausalLM.from_pretrained(tiny_models.path("gemma2"), dtype=getattr(torch, dtype))
    with torch.inference_mode():
        assert torch.equal(embedding(ids), like.get_input_embeddings()(ids))


@pytest.mark.parametrize("shape", [(40, 48), (16, 2), (151, 896)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_packed_and_plain_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    ids = torch.randint(shape[0], (3, 5))
    packed = layout_of(weight)
    assert isinstance(packed, GroupedWeight)
    for layout in (packed, PlainWeight(weight)):
        assert torch.equal(layout.rows(ids), weight[ids])


@pytest.mark.parametrize("alone", [True, False])
def test_threads_may_multiply_at_the_same_time(alone: bool) -> None:
    """The kernels' thread team serves one caller at a time; the others compute alone, with the same result."""
    weights = [layout_of(torch.randn(640, 512)) for _ in range(8)]
    x = torch.randn(9, 512)
    expected = [weight.product(x, None) for weight in weights]
    before = torch.get_num_threads()
    with work_is_shared(), ThreadPoolExecutor(4, initializer=work_alone if alone else None) as pool:
        assert torch.get_num_threads() == 1
        found = list(pool.map(lambda index: weights[index % 8].product(x, None), range(400)))
    assert torch.get_num_threads() == before
    for index, product in enumerate(found):
        assert torch.equal(product, expected[index % 8])
