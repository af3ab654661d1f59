"""Executes plans: turns each into one packed forward pass and draws the next tokens.

The runner keeps a copy of the tokens and the block table of every sequence it was introduced to, in a row that the
sequence holds until it is dropped, so a plan only says what changed. Inputs of a step are gathered from these tables
with whole-array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.contract import SamplingParams
from fastserve.engine.plan import Chunk, NewSequence, StepPlan, StepResult
from fastserve.engine.runner.attention import PagedAttention, StepContext
from fastserve.engine.runner.loading import LoadedModel
from fastserve.engine.sampling.row import SamplingRow
from fastserve.engine.sampling.sampler import sample


@dataclass(slots=True)
class _Row:
    index: int
    params: SamplingParams
    choice: int
    num_prompt_tokens: int
    num_tokens: int
    num_blocks: int = 0


class ModelRunner:
    """Owns the model's tensors. One thread calls it, between steps of one scheduler."""

    def __init__(
        self, loaded: LoadedModel, *, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int
    ) -> None:
        self._model = loaded.model
        self._attention: PagedAttention = loaded.attention
        self._device = loaded.device
        self._block_size = block_size
        self._attention.allocate(num_blocks, block_size, loaded.dtype, loaded.device)
        # Pages of these tables that no sequence has reached are never touched, so they cost no memory.
        self._tokens: npt.NDArray[np.int32] = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._blocks: npt.NDArray[np.int32] = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._rows: dict[int, _Row] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. What it computes is what the plan says and nothing else."""
        sampling = [chunk for chunk in plan.chunks if chunk.sample]
        logits = self.forward(plan)
        if not sampling:
            return StepResult({}, {})
        rows = [self._rows[chunk.seq_id] for chunk in sampling]
        token_ids, logprobs = sample(logits, [self._sampling_row(row) for row in rows])
        for row, token_id in zip(rows, token_ids, strict=True):
            self._tokens[row.index, row.num_tokens] = token_id
            row.num_tokens += 1
        drawn = dict(zip((chunk.seq_id for chunk in sampling), token_ids, strict=True))
        told = {chunk.seq_id: item for chunk, item in zip(sampling, logprobs, strict=True) if item is not None}
        return StepResult(drawn, told)

    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Take in the plan's changes and run the model: logits (sampling chunks, vocabulary), in the plan's order."""
        self.forget(plan.dropped)
        for sequence in plan.new:
            self._introduce(sequence)
        for chunk in plan.chunks:
            row = self._rows[chunk.seq_id]
            end = row.num_blocks + len(chunk.new_block_ids)
            self._blocks[row.index, row.num_blocks : end] = chunk.new_block_ids
            row.num_blocks = end
        # Single tokens lie before longer chunks, as attention wants them; `order` leads back to the plan's order.
        order = sorted(range(len(plan.chunks)), key=lambda index: plan.chunks[index].num_tokens != 1)
        chunks = [plan.chunks[index] for index in order]
        input_ids, positions, ends = self._inputs(chunks)
        last_of = dict(zip(order, ends, strict=True))
        wanted = [last_of[index] for index, chunk in enumerate(plan.chunks) if chunk.sample]
        with torch.inference_mode():
            output = self._model(
                input_ids=self._to_device(input_ids).unsqueeze(0),
                position_ids=self._to_device(positions).unsqueeze(0),
                use_cache=False,
                # transformers takes row numbers here: the head is computed for no rows but those drawn from.
                logits_to_keep=torch.tensor(wanted or [0], device=self._device),
            )
        logits: torch.Tensor = output.logits[0]
        return logits if wanted else logits[:0]

    def forget(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            self._free_rows.append(self._rows.pop(seq_id).index)

    def _introduce(self, sequence: NewSequence) -> None:
        index = self._free_rows.pop()
        count = len(sequence.token_ids)
        self._tokens[index, :count] = sequence.token_ids
        self._rows[sequence.seq_id] = _Row(
            index, sequence.params, sequence.choice, sequence.num_prompt_tokens, num_tokens=count
        )

    def _inputs(
        self, chunks: Sequence[Chunk]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and positions of the packed batch, and where each chunk's last token lies; sets the context."""
        index = np.array([self._rows[chunk.seq_id].index for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.num_tokens for chunk in chunks])
        ends = np.cumsum(counts)
        firsts = ends - counts
        rows = np.repeat(index, counts)
        positions = np.repeat(starts - firsts, counts) + np.arange(ends[-1])
        num_blocks = -(-int((starts + counts).max()) // self._block_size)
        self._attention.context = StepContext(
            starts=firsts.astype(np.int32),
            counts=counts.astype(np.int32),
            positions=starts.astype(np.int32),
            # Beyond a sequence's blocks stands whatever its row last held: valid blocks, masked out.
            block_table=self._blocks[index, :num_blocks],
            token_block=self._blocks[rows, positions // self._block_size],
            token_offset=(positions % self._block_size).astype(np.int32),
        )
        return self._tokens[rows, positions].astype(np.int64), positions, ends - 1

    def _to_device(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _sampling_row(self, row: _Row) -> SamplingRow:
        token_ids = self._tokens[row.index, : row.num_tokens]
        return SamplingRow(row.params, row.choice, token_ids, row.num_prompt_tokens)


def probe_shapes(loaded: LoadedModel) -> None:
    """Run one token without pages, so that the attention learns what each layer stores."""
    token = torch.zeros(1, 1, dtype=torch.long, device=loaded.device)
    loaded.attention.context = None
    with torch.inference_mode():
        loaded.model(input_ids=token, position_ids=token, use_cache=False)
