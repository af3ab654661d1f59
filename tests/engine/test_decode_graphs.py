"""Decoding over buffers that never move: the same tokens as one forward pass after the other gives."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, masking_utils

from fastserve.engine.attention.metadata import AttentionMetadata
from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.devices.find import attention_backend
from fastserve.engine.kernels.device_step import DeviceStep
from fastserve.engine.runner.forward.forward_pass import ForwardParts
from fastserve.engine.runner.forward.graphs import GraphForward, batch_sizes
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.sampled_ids import SampledIds

from .conftest import SHAPE, TinyModels
from .test_engine_equality import EOS, Answer, collect, greedy, make_core, run
from .triton_interpreter import DEVICES, import_kernels, triton_attention


class Rerun:
    """Stands in for CUDA's graphs: calls the function again, and counts."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


def test_few_sizes_and_little_padding() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(5) == (1, 2, 4, 5)
    assert batch_sizes(64) == (1, 2, 4, 8, 16, 32, 48, 64)


class RecordingModel(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """Records the inputs of each forward pass and their addresses."""

    def __init__(self, attention: PagedAttention) -> None:
        super().__init__()
        self._attention = attention
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        step = self._attention._step
        assert isinstance(step, DeviceStep)
        self.seen.append((input_ids[0], position_ids[0], step.seq_lens, step.slot_mapping, step.block_table))
        return types.SimpleNamespace(logits=input_ids[..., None].float())


def parts_of(model: torch.nn.Module, attention: PagedAttention, *, max_num_seqs: int, max_blocks: int) -> ForwardParts:
    cpu = torch.device("cpu")
    return ForwardParts(
        model, attention, SampledIds(max_num_seqs, cpu), cpu, cpu, torch.float32,
        block_size=16, max_num_seqs=max_num_seqs, max_model_len=16 * max_blocks,
    )  # fmt: skip


def test_rows_that_pad_look_at_nothing_and_write_nothing_and_no_buffer_moves() -> None:
    attention = PagedAttention(attention_backend)
    model = RecordingModel(attention)
    graphs = GraphForward(parts_of(model, attention, max_num_seqs=8, max_blocks=3), Rerun())
    at = {len(seen[0]): [tensor.data_ptr() for tensor in seen] for seen in model.seen}
    assert set(at) == {1, 2, 4, 8}
    for count in (7, 3, 1, 2):
        numbers = np.arange(count, dtype=np.int32)
        context = AttentionMetadata(
            starts=numbers,
            counts=np.ones_like(numbers),
            positions=numbers + 16,
            block_table=np.stack([numbers, numbers + 10], axis=1),
            token_block=numbers + 10,
            token_offset=numbers,
        )
        rows = np.arange(count)
        step = PackedStep(rows + 100, rows + 16, rows, context)
        assert graphs.supports(step) is None
        logits = graphs(step)
        assert logits[:, 0].tolist() == (numbers + 100).tolist()
        ids, positions, seq_lens, slot_mapping, table = model.seen[-1]
        assert [tensor.data_ptr() for tensor in model.seen[-1]] == at[len(ids)]
        assert positions[:count].tolist() == (numbers + 16).tolist()
        assert seq_lens[:count].tolist() == (numbers + 17).tolist()
        assert slot_mapping[:count].tolist() == ((numbers + 10) * 16 + numbers).tolist()
        assert table[:count, :2].tolist() == context.block_table.tolist()
        assert seq_lens[count:].tolist() == [0] * (len(ids) - count)
        assert slot_mapping[count:].tolist() == [-1] * (len(ids) - count)


def test_what_fits() -> None:
    attention = PagedAttention(attention_backend)
    graphs = GraphForward(parts_of(RecordingModel(attention), attention, max_num_seqs=4, max_blocks=1), Rerun())

    def fits(*counts: int) -> bool:
        numbers = np.array(counts, dtype=np.int32)
        rows = np.arange(sum(counts))
        metadata = AttentionMetadata(numbers, numbers, numbers, numbers[:, None], numbers, numbers)
        return graphs.supports(PackedStep(rows, rows, rows, metadata)) is None

    assert fits(1)
    assert fits(1, 3)
    assert not fits(1, 1, 3)
    assert not fits(4, 1)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("no_start_check")
def test_an_engine_on_graphs_equals_generate(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, overlap: bool
) -> None:
    """On a GPU as it is served; on a CPU with the same kernels, interpreted, and a stand-in for the graphs."""
    kernels: Any = import_kernels("triton_attention")
    recorder = Rerun()

    if device == "cpu":
        monkeypatch.setattr(CpuDevice, "attention_backend", triton_attention)
        monkeypatch.setattr(CpuDevice, "graph_recorder", lambda self: recorder)
        monkeypatch.setattr(kernels, "_MIN_SPLITS", 1)  # with such short contexts most splits would be empty
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    config = GptOssConfig(**{**SHAPE, **small}, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    path = str(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    core = make_core(
        path, device=device, max_num_seqs=4, max_model_len=64, max_total_tokens=256, overlap=overlap,
        speculative_method="off",  # drafts would be waited for
    )  # fmt: skip
    recorder.replays = 0
    lengths = {"a": (20, 3), "b": (1, 7), "late": (3, 3)}
    prompts = {key: list(range(2, 2 + length)) for key, (length, _) in lengths.items()}
    answers = {key: Answer() for key in lengths}
    for key, (_, max_tokens) in lengths.items():
        if key == "late":  # its prompt is short enough to be replayed beside the others' single tokens
            while answers["a"].finish_reason is None:
                collect(core, answers)
        core.add(greedy(prompts[key], max_tokens, key))
    run(core, answers)
    for key, (_, max_tokens) in lengths.items():
        assert answers[key].token_ids == tiny_models.reference(path, prompts[key], max_tokens, [EOS])
    if device == "cpu":
        assert recorder.replays == core.stats.steps - 1, "all steps but the first, which takes a long prompt"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_mask_is_made_for_which_transformers_would_look_at_positions(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a GPU that look waits for all steps before."""

    def look(positions: torch.Tensor) -> None:
        raise AssertionError("positions are looked at")

    core = make_core(tiny_models.path(name), block_size=4)  # in blocks of 4 the model's modules compute steps
    answers = {"r": Answer()}
    core.add(greedy([3, 4, 5], 4))
    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", look)
        run(core, answers)
    assert answers["r"].token_ids == tiny_models.reference(tiny_models.path(name), [3, 4, 5], 4, [EOS])
