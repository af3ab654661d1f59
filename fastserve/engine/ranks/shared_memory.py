"""Collectives over shared memory (kernels/all_reduce.h), of ranks on one machine's CPUs or, with a relay (network.py),
on several machines. Tensors of other devices are copied to the host."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

import torch

from fastserve.engine.kernels.build import cpu_library
from fastserve.engine.ranks.collectives import RankLostError
from fastserve.engine.ranks.exchange_record import ExchangeRecord
from fastserve.engine.ranks.segment import Segment

_LOSSES = {
    1: "another rank of the model was lost",
    2: "another rank of the model did not answer within {timeout_s:g} s",
    3: "the ranks of the model made different calls",
}


class RanksStruct(ctypes.Structure):
    """Ranks in all_reduce.h."""

    _fields_ = [
        ("header", c_void_p),
        *((name, c_int64) for name in ("rank", "size", "capacity")),
        ("timeout_s", c_double),
        ("done", c_uint32),
        ("loss", c_int32),
    ]


class SharedMemoryCollectives:
    """Owns the segment. Layers and kernels keep this object through all groups that the rank is in (`enter`)."""

    def __init__(self, library: ctypes.CDLL, segment: Segment, rank: int, timeout_s: float) -> None:
        """`timeout_s`: longest wait for another rank."""
        self.rank = rank
        self.size = segment.num_ranks
        self.segment = segment
        self._library: Any = library
        library.all_reduce.argtypes = (c_void_p, c_void_p, c_void_p, c_int64)
        library.all_gather.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
        self.struct = RanksStruct(segment.address, rank, self.size, segment.slot_bytes, timeout_s, 0, 0)
        """For kernels that exchange by themselves."""
        self._record: ExchangeRecord | None = None

    @classmethod
    def load(cls, segment: Segment, rank: int, timeout_s: float) -> SharedMemoryCollectives | None:
        """None where the kernels cannot be built."""
        library = cpu_library(torch.float32)
        return None if library is None else cls(library, segment, rank, timeout_s)

    def enter(self, joined: SharedMemoryCollectives) -> None:
        """Go on in the group that `joined` has joined, as the same rank; this one must be closed before."""
        self.segment = joined.segment
        ctypes.pointer(self.struct)[0] = joined.struct

    @contextlib.contextmanager
    def recorded(self, record: ExchangeRecord) -> Iterator[None]:
        """Within the block, results of exchanges are taken from the record, or added to it if it is to be filled."""
        self._record = record
        try:
            yield
        finally:
            self._record = None

    def abort(self) -> None:
        """Have all waits of this machine's ranks fail from now on. Any thread may call it."""
        self.segment.declare_lost()

    def set_timeout(self, timeout_s: float) -> None:
        self.struct.timeout_s = timeout_s

    def fits(self, num_rows: int, width: int) -> bool:
        """Whether a kernel can exchange so many sums at once."""
        return 4 * num_rows * width <= self.segment.slot_bytes

    def all_reduce(self, partial: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._record is None:
            return self._sum(partial, out_dtype)
        return self._record.result(lambda: self._sum(partial, out_dtype)).to(partial.device)

    def _sum(self, partial: torch.Tensor, out_dtype: torch.dtype | None) -> torch.Tensor:
        part = partial.to(device="cpu", dtype=torch.float32).contiguous()
        sums = torch.empty_like(part)
        self.check(self._library.all_reduce(self._pointer, part.data_ptr(), sums.data_ptr(), part.numel()))
        return sums.to(device=partial.device, dtype=out_dtype or partial.dtype)

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        every = self.all_gather(values.unsqueeze(0), 0)
        return every.amax(dim=0)

    def all_gather(self, part: torch.Tensor, dim: int = -1) -> torch.Tensor:
        device = part.device
        part = part.cpu().contiguous()
        sizes = self._gather_bytes(torch.tensor([part.shape[dim]]), [8] * self.size).view(torch.int64).tolist()
        shapes = [[*part.shape] for _ in sizes]
        for shape, size in zip(shapes, sizes, strict=True):
            shape[dim] = size
        counts = [torch.Size(shape).numel() for shape in shapes]
        flat = self._gather_bytes(part, [count * part.element_size() for count in counts]).view(part.dtype)
        return torch.cat([one.view(shape) for one, shape in zip(flat.split(counts), shapes, strict=True)], dim).to(
            device
        )

    def barrier(self) -> None:
        self._gather_bytes(torch.empty(0, dtype=torch.uint8), [0] * self.size)

    def close(self) -> None:
        self.segment.close()

    def check(self, loss: int) -> None:
        """Raise the error for what a kernel returned; 0 is none."""
        if loss:
            raise RankLostError(f"A step ended early: {_LOSSES[loss].format(timeout_s=self.struct.timeout_s)}.")

    def _gather_bytes(self, part: torch.Tensor, num_bytes: list[int]) -> torch.Tensor:
        """Each rank's part one after the other, as bytes."""
        if self._record is None:
            return self._gather(part, num_bytes)
        return self._record.result(lambda: self._gather(part, num_bytes))

    def _gather(self, part: torch.Tensor, num_bytes: list[int]) -> torch.Tensor:
        out = torch.empty(sum(num_bytes), dtype=torch.uint8)
        sizes = (c_int64 * self.size)(*num_bytes)
        self.check(self._library.all_gather(self._pointer, part.data_ptr(), out.data_ptr(), sizes))
        return out

    @property
    def _pointer(self) -> Any:
        return ctypes.byref(self.struct)
