"""Models on several devices: the plan, the transfers during a step, and refusals."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from fastserve.engine import build, sizing
from fastserve.engine.attention.cpu_backend import CpuAttention
from fastserve.engine.build import build_core
from fastserve.engine.core import EngineCore
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import device_of
from fastserve.engine.layers.layouts.find import is_mapped
from fastserve.engine.layers.layouts.quantized import QuantizedWeight
from fastserve.engine.layers.linear import Linear
from fastserve.engine.loading import placement as placement_module
from fastserve.engine.loading.loader import LoadedModel, load_model
from fastserve.engine.loading.placement import Caps, Placement, find_placement, make_placement, plan, quantized_dtypes
from fastserve.engine.memory import FreeMemory
from fastserve.engine.runner.forward.forward_pass import ForwardParts, UnsupportedError
from fastserve.engine.runner.forward.whole_step import WholeStepForward
from fastserve.engine.runner.runner import ModelRunner
from fastserve.engine.runner.sampled_ids import SampledIds
from fastserve.engine.settings import EngineConfig, WeightOptions
from fastserve.engine.spread import Spread, read_gpu_memory, refuse_gpu_ids, refuse_spread
from fastserve.errors import StartupError

from .conftest import CONFIGS, SHAPE, TinyModels
from .packers import write_packed
from .separate_devices import CPU, FIRST, SECOND, separate_devices
from .test_engine_equality import EOS, Answer, greedy, make_core, run
from .test_formats import gptq_packer

GB = 10**9
LARGE = LlamaConfig(  # 8 billion parameters, 16 GB
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


# ---- the plan ---------------------------------------------------------------------------------------------------


def on_meta(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def weights_by_place(model: PreTrainedModel, places: dict[str, int | str]) -> Counter[int | str]:
    """Size in bytes; tied weights count once."""
    placement = make_placement(model, places, [torch.device("cuda", index) for index in range(8)])
    found: Counter[int | str] = Counter()
    for name, parameter in model.named_parameters():
        place = placement.place_of(name)
        found["disk" if place.on_disk else place.device.index or 0 if place.device.type == "cuda" else "cpu"] += (
            parameter.numel() * parameter.itemsize
        )
    return found


def layer_places(model: PreTrainedModel, places: dict[str, int | str]) -> list[str]:
    """The device of each decoder layer. Fails if a layer's weights are on several devices."""
    placement = make_placement(model, places, [torch.device("cuda", index) for index in range(8)])
    found = []
    for index, layer in enumerate(model.base_model.layers):
        names = [f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()]
        (place,) = {str(placement.place_of(name)) for name in names}
        found.append(place)
    return found


@pytest.fixture(scope="module")
def large() -> PreTrainedModel:
    return on_meta(LARGE)


def test_several_gpus_are_filled_evenly_with_whole_layers_in_order(large: PreTrainedModel) -> None:
    for count in (2, 4):
        places = plan(large, Caps((70 * GB,) * count, None))
        shares = weights_by_place(large, places)
        assert set(shares) == set(range(count))
        assert max(shares.values()) < 1.4 * 16.06 * GB / count
        layers = layer_places(large, places)
        assert layers == sorted(layers)
        assert len(set(layers)) == count


def test_no_gpu_is_filled_beyond_its_cap_and_the_next_one_takes_the_rest(large: PreTrainedModel) -> None:
    places = plan(large, Caps((5 * GB, 14 * GB), None))
    shares = weights_by_place(large, places)
    assert 3 * GB < shares[0] <= 5 * GB
    assert shares[1] == sum(shares.values()) - shares[0] <= 14 * GB
    assert layer_places(large, places) == sorted(layer_places(large, places))


def test_what_the_gpu_does_not_hold_goes_to_the_host_and_then_to_disk(large: PreTrainedModel) -> None:
    host = weights_by_place(large, plan(large, Caps((10 * GB,), 100 * GB)))
    assert set(host) == {0, "cpu"}
    assert 8 * GB < host[0] <= 10 * GB
    places = plan(large, Caps((6 * GB,), 6 * GB))
    disk = weights_by_place(large, places)
    assert set(disk) == {0, "cpu", "disk"}
    assert disk[0] <= 6 * GB
    assert disk["cpu"] <= 6 * GB
    assert list(dict.fromkeys(layer_places(large, places))) == ["cuda:0", "cpu", "disk"]


def test_tied_weights_and_what_has_none_stay_with_the_embedding() -> None:
    config = LlamaConfig(**{**LARGE.to_dict(), "tie_word_embeddings": True})
    model = on_meta(config)
    for caps in (Caps((70 * GB, 70 * GB), None), Caps((6 * GB,), 20 * GB)):
        placement = make_placement(model, plan(model, caps), [FIRST, SECOND])
        embedding = placement.place_of("model.embed_tokens.weight")
        assert placement.place_of("lm_head.weight") == embedding
        assert placement.place_of("model.rotary_emb.inv_freq") == embedding
        assert placement.main == embedding.device == FIRST
        assert placement.device_of("model.layers.31.mlp.up_proj.weight") != FIRST


def test_weights_in_fewer_bits_take_less_room(large: PreTrainedModel) -> None:
    """14 GB of linear layers take a half or a quarter; 2.1 GB of embedding and LM head are unchanged. The planner also
    reserves room for the largest part, 1 GB."""
    for quantize, enough in (("int8", 10.2 * GB), ("nf4", 6.7 * GB)):
        special_dtypes = quantized_dtypes(large, quantize)
        assert "lm_head.weight" not in special_dtypes
        assert set(plan(large, Caps((int(enough),), None), special_dtypes).values()) == {0}
        assert set(plan(large, Caps((int(enough - 1.5 * GB),), None), special_dtypes).values()) == {0, "disk"}


# ---- what the flags say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 << 30), ("20GB", 20 * GB), ("13Gib", 13 << 30), ("1.5gib", 3 << 29), ("800 MiB", 800 << 20)],
)
def test_sizes_of_memory(text: str, expected: int) -> None:
    assert read_gpu_memory(text) == expected


@pytest.mark.parametrize(("text", "remedy"), [("20", "20GiB"), ("much", "20GiB"), ("0GiB", "20GiB"), ("-3GB", "20GiB")])
def test_sizes_that_cannot_be_read(text: str, remedy: str) -> None:
    with pytest.raises(StartupError, match=rf"^--max-gpu-memory {text} is not .*{remedy}.*\.$"):
        read_gpu_memory(text)


@pytest.mark.parametrize(("gpus", "reason"), [("0;2", "'0;2'"), ("0,", "''"), ("a", "'a'"), ("1,1", "twice")])
def test_lists_of_gpus_that_cuda_would_misread(gpus: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        refuse_gpu_ids(gpus)
    refuse_gpu_ids("0,2")
    refuse_gpu_ids("GPU-8f1a6f0e-0b5f,MIG-GPU-1/2/0")


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
@pytest.mark.parametrize("spread", [Spread(num_gpus=2), Spread(cpu_offloading=True)])
def test_only_cuda_has_several_devices(device: str, spread: Spread) -> None:
    flag = "--num-gpus 2" if spread.num_gpus > 1 else "--cpu-offloading"
    with pytest.raises(StartupError, match=rf"^{flag} .*{device}.*leave it out.*\.$"):
        refuse_spread(device, spread)
    refuse_spread(device, Spread(max_gpu_memory=GB))
    refuse_spread("cuda", spread)


def with_gpus(monkeypatch: pytest.MonkeyPatch, *free: int, host: int = 100 * GB) -> None:
    """Simulate GPUs of which all memory, this much each, is free."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], free[device.index]))
    monkeypatch.setattr(placement_module, "free_host_memory", lambda: FreeMemory(host, "in this test"))


CUDA = torch.device("cuda")


def test_the_caps_are_what_is_free_less_a_share_for_the_cache(
    large: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 24 * GB, 24 * GB)
    assert find_placement(large, CUDA, Spread(), 0.9) is None
    assert find_placement(large, CUDA, Spread(max_gpu_memory=GB), 0.9) is None
    both = find_placement(large, CUDA, Spread(2, 20 * GB), 0.9)
    assert both is not None
    assert both.devices == (torch.device("cuda:0"), torch.device("cuda:1"))
    one = find_placement(large, CUDA, Spread(1, 8 * GB, cpu_offloading=True), 0.9)
    assert one is not None
    assert one.devices == (torch.device("cuda:0"), CPU)
    with_gpus(monkeypatch, 20 * GB)  # 0.9 of it, and the cache's share, do not leave 16 GB
    tight = find_placement(large, CUDA, Spread(1, 30 * GB, cpu_offloading=True), 0.9)
    assert tight is not None
    assert CPU in tight.devices


def test_quantized_weights_are_not_put_on_disk(large: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 5 * GB, host=8 * GB)
    spread = Spread(cpu_offloading=True)
    placement = find_placement(large, CUDA, spread, 0.9, "nf4")
    assert placement is not None
    assert not any(placement.place_of(name).on_disk for name, _ in large.named_parameters())
    with pytest.raises(StartupError, match=r"^--cpu-offloading: .*--load-8bit.* are not kept on disk: .*\.$"):
        find_placement(large, CUDA, spread, 0.9, "int8")


@pytest.mark.parametrize(
    ("flag", "settings"), [("--num-gpus 2", {"num_gpus": 2}), ("--cpu-off", {"cpu_offloading": True})]
)
def test_a_detected_device_is_checked_too(tiny_models: TinyModels, flag: str, settings: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU would be found here")
    with pytest.raises(StartupError, match=f"^{flag}.*leave it out.*"):
        make_core(tiny_models.path("llama"), device=None, **settings)


@pytest.mark.parametrize(
    ("free", "spread", "words"),
    [
        ([24 * GB], Spread(2), "--num-gpus 2: 1 GPU is to be seen here .* start with --num-gpus 1, or add --cpu-off"),
        ([24 * GB] * 2, Spread(3, cpu_offloading=True), "--num-gpus 3: 2 GPUs are .* start with --num-gpus 2\\.$"),
        ([24 * GB] * 2, Spread(2, 5 * GB), "16.1 GB of weights do not fit .*5.0 GB, 5.0 GB by --max-gpu-memory"),
        ([8 * GB] * 2, Spread(2), "do not fit .* 6.1 GB, 6.1 GB by their free memory: .* or add --cpu-offloading"),
        ([24 * GB], Spread(1, GB // 10, cpu_offloading=True), "no GPU has room for a part .* start with --device cpu"),
    ],
)
def test_a_model_too_large_for_the_machine_is_refused_with_a_remedy(
    large: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, free: list[int], spread: Spread, words: str
) -> None:
    with_gpus(monkeypatch, *free)
    with pytest.raises(StartupError, match=words):
        find_placement(large, CUDA, spread, 0.9)


# ---- running ----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[float, float | None, int]] = {
    # shares of all weights: cap of each GPU, cap of the host; number of GPUs
    "two gpus": (0.75, None, 2),
    "gpu and cpu": (0.6, 10.0, 1),
    "gpu, cpu and disk": (0.6, 0.5, 1),
}


@pytest.fixture
def copies() -> Iterator[list[tuple[torch.device, torch.device]]]:
    with separate_devices() as devices:
        yield devices.copies


Spreader = Callable[[str], Callable[..., Placement]]


@pytest.fixture
def spread_over(tmp_path: Path) -> Spreader:
    """A planner for a spread by its name."""

    def choose(layout: str) -> Callable[..., Placement]:
        share, host, count = LAYOUTS[layout]

        def find_places(model: PreTrainedModel, *_: Any) -> Placement:
            total = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
            caps = Caps((int(share * total),) * count, None if host is None else int(host * total))
            places = plan(model, caps)
            used = {0, 1} if count == 2 else {0, "cpu", "disk"} if layout.endswith("disk") else {0, "cpu"}
            assert set(places.values()) == used
            return make_placement(model, places, [FIRST, SECOND], tmp_path)

        return find_places

    return choose


def spread_core(
    monkeypatch: pytest.MonkeyPatch, path: str, find_places: Callable[..., Placement], **settings: Any
) -> tuple[EngineCore, ModelRunner, LoadedModel]:
    seen: list[LoadedModel] = []

    def load(*args: Any, **kwargs: Any) -> LoadedModel:
        seen.append(load_model(*args, **kwargs))
        return seen[0]

    monkeypatch.setattr(build, "find_placement", find_places)
    monkeypatch.setattr(build, "load_model", load)
    core = make_core(path, **{"max_total_tokens": 512, **settings})
    runner = core._executor
    assert isinstance(runner, ModelRunner)
    return core, runner, seen[0]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2", "qwen3_moe"))]
)
def test_an_engine_on_several_devices_equals_generate(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    copies: list[tuple[torch.device, torch.device]],
    spread_over: Spreader,
    name: str,
    layout: str,
) -> None:
    path = tiny_models.path(name)
    rng = random.Random(3)
    prompts = {f"r{length}": [rng.randrange(2, 160) for _ in range(length)] for length in (2, 20, 45)}
    core, runner, loaded = spread_core(monkeypatch, path, spread_over(layout), max_num_batched_tokens=32, block_size=16)
    assert [way.name for way in runner.forward_passes.ways] == ["modules"]
    answers = {key: Answer() for key in prompts}
    for key, prompt in prompts.items():
        assert core.add(greedy(prompt, 12, key)) is None
    run(core, answers)
    assert loaded.placement is not None
    layers = "transformer.h" if name == "gpt2" else "model.layers"
    for index, (keys, values) in enumerate(loaded.attention.caches()):
        assert keys.device == values.device == loaded.placement.device_of(f"{layers}.{index}")
        assert keys.any()
    for key, prompt in prompts.items():
        assert answers[key].token_ids == tiny_models.reference(path, prompt, 12, [EOS])
    assert set(loaded.devices) == ({FIRST, SECOND} if layout == "two gpus" else {FIRST, CPU})


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "method", ["int8", *(pytest.param(method, marks=pytest.mark.slow) for method in ("nf4", "gptq"))]
)
def test_quantized_weights_live_on_several_devices(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    copies: list[tuple[torch.device, torch.device]],
    spread_over: Spreader,
    tmp_path: Path,
    method: str,
    layout: str,
) -> None:
    """Besides the check at start, which compares the engine with the model's own code on these weights, they must equal
    the weights that the same flags give on one device."""
    path = tiny_models.path("llama")
    weights = WeightOptions(quantize=method)
    if method == "gptq":
        packed = tmp_path / "packed"
        write_packed(path, packed, gptq_packer(4, 48), {"quant_method": "gptq", "bits": 4})
        path, weights = str(packed), WeightOptions()
    _, _, loaded = spread_core(monkeypatch, path, spread_over(layout), weights=weights)
    whole = load_model(path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None, options=weights)
    assert loaded.placement is not None
    assert len(loaded.devices) == 2
    names = [name for name, _ in on_meta(CONFIGS["llama"]).named_parameters()]
    for name in names:
        place = loaded.placement.place_of(name)
        found = loaded.weights.get(name)
        assert found.device == place.device
        assert torch.allclose(found.cpu(), whole.weights.get(name), atol=1e-6)
    layouts = [module.layout for module in loaded.model.modules() if isinstance(module, Linear)]
    assert sum(isinstance(layout, QuantizedWeight) for layout in layouts) >= 21


def test_a_step_copies_hidden_states_once_at_a_border_and_the_rest_once_for_a_device(
    monkeypatch: pytest.MonkeyPatch,
    copies: list[tuple[torch.device, torch.device]],
    spread_over: Spreader,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)  # no end token first, so that there is a second step
    counts = {}
    for num_layers in (4, 8):
        path = tmp_path / str(num_layers)
        config = LlamaConfig(**{**SHAPE, "num_hidden_layers": num_layers})
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        core, _, _ = spread_core(monkeypatch, str(path), spread_over("two gpus"))
        core.add(greedy([5, 6, 7], 2))
        core.step()
        copies.clear()
        core.step()
        counts[num_layers] = Counter(copies)
    for count in counts.values():
        assert count[FIRST, SECOND] == 4  # hidden states; cosines, sines and positions
        assert count[SECOND, FIRST] == 1  # logits


def test_these_devices_do_refuse_to_meet(tiny_models: TinyModels, spread_over: Spreader) -> None:
    with separate_devices():
        model = AutoModelForCausalLM.from_pretrained(tiny_models.path("llama"))
        placement = spread_over("two gpus")(model)
        for name, parameter in list(model.named_parameters()):
            path, _, leaf = name.rpartition(".")
            moved = torch.nn.Parameter(placement.put(name, parameter.data), requires_grad=False)
            model.get_submodule(path)._parameters[leaf] = moved
        ids = torch.tensor([[4, 5]], device=FIRST)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"tensors on \['lazy:0', 'lazy:1'\]"):
            model(input_ids=ids, use_cache=False)


def test_weights_on_any_device_can_be_read_and_set_by_name(
    tiny_models: TinyModels, copies: list[tuple[torch.device, torch.device]], spread_over: Spreader, tmp_path: Path
) -> None:
    loaded = load_model(
        tiny_models.path("llama"), "cpu", "float32",
        trust_remote_code=False, progress=lambda *_: None, find_places=spread_over("gpu, cpu and disk"),
    )  # fmt: skip
    original = AutoModelForCausalLM.from_pretrained(tiny_models.path("llama"), dtype=torch.float32)
    assert loaded.placement is not None
    mapped = 0
    for name, parameter in original.named_parameters():
        place = loaded.placement.place_of(name)
        weight = loaded.weights.get(name)
        assert weight.device == place.device
        assert torch.equal(weight.cpu(), parameter)
        if place.on_disk:
            mapped += 1
            assert is_mapped(weight)
        loaded.weights.set(name, parameter + 1)
        assert torch.equal(loaded.weights.get(name).cpu(), parameter + 1)
    assert mapped >= 9  # the weights of a layer
    assert not list(tmp_path.iterdir())  # the files are already unlinked


def test_a_full_disk_is_refused(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    copies: list[tuple[torch.device, torch.device]],
    spread_over: Spreader,
) -> None:
    def reserve(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(StartupError, match=r"--cpu-offloading: .*No space left on device.* set XDG_CACHE_HOME"):
        spread_core(monkeypatch, tiny_models.path("llama"), spread_over("gpu, cpu and disk"))


@pytest.mark.parametrize("small", [FIRST, SECOND])
def test_the_number_of_blocks_is_the_minimum_over_devices(
    tiny_models: TinyModels,
    monkeypatch: pytest.MonkeyPatch,
    copies: list[tuple[torch.device, torch.device]],
    spread_over: Spreader,
    small: torch.device,
) -> None:
    room = 1 << 20

    def free(device: Device) -> FreeMemory:
        return FreeMemory(room if device.torch_device == small else 1 << 30, f"on {device.torch_device}")

    for kind in (CpuDevice, type(device_of(small))):
        monkeypatch.setattr(kind, "free_memory", free)
    monkeypatch.setattr(sizing, "_FIXED_BYTES", 0)
    settings: dict[str, Any] = {"max_total_tokens": None, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    core, _, loaded = spread_core(monkeypatch, tiny_models.path("llama"), spread_over("two gpus"), **settings)
    layers = sum(keys.device == small for keys, _ in loaded.attention.caches())
    assert 0 < layers < 3
    per_token = layers * 2 * (12 + 12) * 4  # KV heads x (key and value) x float32
    assert loaded.attention.bytes_per_token(16, torch.float32, small) == per_token
    config = EngineConfig(model_dir=tiny_models.path("llama"), max_num_seqs=4, max_num_batched_tokens=8)
    others = sizing.step_bytes(loaded, config, 8, 256, small)
    afforded = int(0.9 * room) - others
    assert core.info.num_blocks == min(4 * 256, afforded // per_token) // 16
    room = 1 << 12
    with pytest.raises(StartupError, match=f"Not enough memory: 0 MB are free on {small}"):
        build_core(EngineConfig(model_dir=tiny_models.path("llama"), device="cpu", **settings), lambda *_: None)


def test_a_part_on_another_device_is_not_given_to_the_kernel_for_whole_steps_on_cpus(tiny_models: TinyModels) -> None:
    """The kernel reads by addresses: those of another device's memory would end the process."""
    path = tiny_models.path("llama")
    loaded = load_model(path, "cpu", "float32", trust_remote_code=False, progress=lambda *_: None)
    loaded.attention.allocate(4, 16, torch.float32)
    if not isinstance(loaded.attention.backend, CpuAttention):
        pytest.skip("no compiler is installed")
    parts = ForwardParts(loaded.model, loaded.attention, SampledIds(1, CPU), CPU, CPU, torch.float32, 16, 1, 63)
    WholeStepForward.build(parts)
    embedding = loaded.model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedError, match="device"):
        WholeStepForward.build(parts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_a_real_gpu_and_the_cpu(tiny_models: TinyModels, name: str) -> None:
    """End to end, from the flags on; the cap leaves only some layers on the GPU."""
    path = tiny_models.path(name)
    model = on_meta(CONFIGS[name], torch.float32)
    total = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    cap = f"{0.6 * total / 1e3:.0f}KB"
    core = make_core(path, device="cuda", cpu_offloading=True, max_gpu_memory=cap, max_total_tokens=512)
    assert core.info.device == "cuda:0, cpu"
    prompt = list(range(3, 30))
    answers = {"r": Answer()}
    core.add(greedy(prompt, 16))
    run(core, answers)
    assert answers["r"].token_ids == tiny_models.reference(path, prompt, 16, [EOS])
