"""The Triton attention against attention written down as it is defined: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

from fastserve.engine.attention.metadata import AttentionMetadata, LayerShape
from fastserve.engine.attention.paged import PagedAttention
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.devices.find import attention_backend

from .test_paged_attention import definition
from .triton_interpreter import DEVICES, import_kernels, triton_attention

kernels: Any = import_kernels("triton_attention")

from fastserve.engine.attention.triton_backend import TritonAttention  # noqa: E402  # needs triton

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NUM_BLOCKS = 48


class History:
    """Sequences with scattered blocks, and all keys and values that they were given."""

    def __init__(self, shape: LayerShape, count: int, block_size: int, dtype: torch.dtype, device: str) -> None:
        self.shape, self.block_size, self.dtype, self.device = shape, block_size, dtype, device
        self.attention = PagedAttention(attention_backend)
        self.attention.shapes[0], self.attention.devices[0] = shape, torch.empty(0, device=device).device
        self.attention.allocate(NUM_BLOCKS, block_size, dtype)
        assert isinstance(self.attention.backend, TritonAttention)
        self.tables = np.random.default_rng(0).permutation(NUM_BLOCKS).reshape(count, -1).astype(np.int32)
        self.keys = [torch.zeros(0, shape.num_kv_heads, shape.key_dim, dtype=dtype) for _ in range(count)]
        self.values = [torch.zeros(0, shape.num_kv_heads, shape.value_dim, dtype=dtype) for _ in range(count)]

    def spoil(self) -> None:
        """Whatever other requests left in the blocks."""
        for cache in self.attention.caches()[0]:
            cache.fill_(float("nan"))

    def step(self, counts: list[int], **options: Any) -> None:
        """Give each sequence `counts` new tokens (0: it takes no part) and compare with the definition."""
        shape = self.shape
        order = sorted((i for i in range(len(counts)) if counts[i]), key=lambda index: counts[index] != 1)
        lengths = [counts[index] for index in order]
        firsts = [len(self.keys[index]) for index in order]
        starts = np.cumsum([0, *lengths[:-1]])
        places = [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
        query, key, value = (
            torch.randn(1, sum(counts), number, dim).to(self.dtype).transpose(1, 2)
            for number, dim in (
                (shape.num_heads, shape.key_dim),
                (shape.num_kv_heads, shape.key_dim),
                (shape.num_kv_heads, shape.value_dim),
            )
        )
        metadata = AttentionMetadata(
            starts=starts.astype(np.int32),
            counts=np.array(lengths, dtype=np.int32),
            positions=np.array(firsts, dtype=np.int32),
            block_table=self.tables[order],
            token_block=np.concatenate(
                [self.tables[i][at // self.block_size] for i, at in zip(order, places, strict=True)]
            ),
            token_offset=np.concatenate(places).astype(np.int32) % self.block_size,
        )
        on_device = {
            name: item.to(self.device) if isinstance(item, torch.Tensor) else item for name, item in options.items()
        }
        query_at, key_at, value_at = (tensor.to(self.device) for tensor in (query, key, value))
        module = types.SimpleNamespace(layer_idx=0)
        with self.attention.running(metadata):
            out, _ = self.attention(module, query_at, key_at, value_at, None, **on_device)
        for index, start, first, length in zip(order, starts, firsts, lengths, strict=True):
            part = slice(int(start), int(start) + length)
            self.keys[index] = torch.cat([self.keys[index], key[0, :, part].transpose(0, 1)])
            self.values[index] = torch.cat([self.values[index], value[0, :, part].transpose(0, 1)])
            expected = definition(
                query[0, :, part].transpose(0, 1), self.keys[index], self.values[index], first,
                options["scaling"], shape.window, options.get("softcap"), options.get("s_aux"), shape.chunk,
            )  # fmt: skip
            found = out[0, part].double().cpu()
            assert (found - expected).abs().max() <= TOLERANCE[self.dtype] * expected.abs().max()


@pytest.fixture(autouse=True)
def triton_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "attention_backend", triton_attention)
    # Short contexts are cut into splits too.
    monkeypatch.setattr(kernels, "_MIN_SPLIT_TOKENS", 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "dtype", "block_size", "options"),
    [
        pytest.param(*(LayerShape(4, 2, 16, 16), torch.float32, 16, {}), marks=pytest.mark.slow),
        (LayerShape(8, 2, 64, 64), torch.bfloat16, 16, {}),
        pytest.param(*(LayerShape(4, 4, 96, 96), torch.float16, 64, {}), marks=pytest.mark.slow),
        pytest.param(*(LayerShape(7, 1, 64, 64, window=20), torch.float32, 64, {}), marks=pytest.mark.slow),
        (LayerShape(4, 1, 128, 128, window=70), torch.bfloat16, 64, {}),
        pytest.param(*(LayerShape(2, 1, 256, 256), torch.float16, 16, {"softcap": 20.0}), marks=pytest.mark.slow),
        (LayerShape(3, 3, 24, 40, window=7), torch.float32, 4, {"softcap": 5.0}),
        (LayerShape(4, 2, 32, 32), torch.float32, 16, {"s_aux": torch.tensor([1.0, -2.0, 8.0, 0.0])}),
        (
            LayerShape(4, 2, 64, 64, window=9),
            torch.bfloat16,
            16,
            {"s_aux": torch.tensor([1.0, -2.0, 8.0, 0.0])},
        ),
        (LayerShape(4, 2, 32, 32, chunk=7), torch.float32, 16, {}),
        (LayerShape(4, 2, 32, 32, chunk=64), torch.float32, 16, {"s_aux": torch.tensor([1.0, -2.0, 8.0, 0.0])}),
    ],
)
def test_equals_the_definition(
    device: str, shape: LayerShape, dtype: torch.dtype, block_size: int, options: dict[str, Any]
) -> None:
    """Whole prompts, chunks with a context, single tokens, and a few tokens at a time, in one batch."""
    torch.manual_seed(0)
    history = History(shape, 4, block_size, dtype, device)
    history.spoil()
    longest = history.tables.shape[1] * block_size - 12
    for counts in ([1, min(longest, 9000 // shape.key_dim, 140), 17, 2], [1, 1, 1, 3], [9, 1, 2, 0], [1, 1, 1, 1]):
        history.step([min(count, 15 if block_size < 16 else count) for count in counts], scaling=0.3, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_splits_are_joined_whatever_their_number(device: str) -> None:
    """One context of each length around the edges of tiles and splits."""
    torch.manual_seed(0)
    history = History(LayerShape(2, 1, 16, 16), 3, 16, torch.float32, device)
    history.spoil()
    history.step([62, 127, 200], scaling=0.5)
    for _ in range(4):
        history.step([1, 1, 1], scaling=0.5)


def test_the_cut_depends_on_the_batch_alone_and_fills_the_device() -> None:
    kernel = kernels.TritonPagedAttention(torch.device("cpu"))
    kernel._multiprocessors = 132
    for programs in (1, 8, 64, 512, 4096):
        splits, min_split = kernel.split(programs, 64)
        assert splits & (splits - 1) == 0
        assert 8 <= splits <= 64
        assert programs * splits >= min(2 * 132, 64)
        assert min_split % 64 == 0
        assert min_split >= 64
