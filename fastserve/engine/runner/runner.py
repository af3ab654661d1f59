"""Executes plans: runs one packed forward pass for each and samples the next tokens.

The runner keeps the tokens and block table of each sequence in a row of its tables until the sequence is dropped, so a
plan contains only changes. Inputs of a step are gathered from these tables with whole-array operations.

A step is launched, and its result is read later: on CUDA the host may launch the next step meanwhile. For an id that is
sampled but not read back yet, the next step's inputs have a placeholder (see sampled_ids.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastserve.engine.adapters.batch import NO_SLOT, AdapterBatch
from fastserve.engine.adapters.memory import AdapterMemory
from fastserve.engine.attention.backend import KVCache
from fastserve.engine.attention.metadata import AttentionMetadata
from fastserve.engine.contract import TokenLogprob
from fastserve.engine.loading.loader import LoadedModel
from fastserve.engine.plan import Chunk, NewSequence, StepPlan, StepResult
from fastserve.engine.runner.forward.find import ForwardPasses
from fastserve.engine.runner.forward.forward_pass import ForwardParts, ForwardPass
from fastserve.engine.runner.packed_step import PackedStep
from fastserve.engine.runner.sampled_ids import SampledIds
from fastserve.engine.sampling.logprobs import Logprobs, gather
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.sampling.processor import LogitsProcessor, SamplingRow, SamplingState
from fastserve.engine.sampling.sampler import SampledTokens, Sampler
from fastserve.engine.transfers import Readback, to_device


@dataclass(slots=True, eq=False)
class _Row:
    index: int
    sampling: SamplingState
    num_tokens: int
    """Tokens known on the host."""
    num_pending: int = 0
    """Tokens sampled after them by steps whose results have not been read."""
    adapter: int = NO_SLOT
    is_long: bool = False
    """Whether it has the rotary frequencies of long sequences."""
    sampled_at: int = 0
    """Index of the last pending token among the ids that the last step sampled."""


class ModelRunner:
    """Owns the model's tensors. One thread calls it, between steps of one scheduler."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int | None = None,
        processors: Sequence[LogitsProcessor] = LOGITS_PROCESSORS,
        make_adapter_memory: Callable[[Sequence[KVCache]], AdapterMemory] | None = None,
    ) -> None:
        """`vocab_size`: number of logits to sample from, for a draft model whose vocabulary may be padded differently
        from the model's; None: all. `make_adapter_memory`: makes the memory of adapters beside the KV cache, for a
        model that serves any."""
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._rope_switch_length = loaded.rope_switch_length
        loaded.attention.allocate(num_blocks, block_size, loaded.dtype)
        self.adapter_memory: AdapterMemory | None = None
        if make_adapter_memory is not None:
            self.adapter_memory = make_adapter_memory(loaded.attention.caches())
        # Parts of these tables that no sequence has reached are never written, so they take no physical memory.
        self._tokens: npt.NDArray[np.int32] = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._blocks: npt.NDArray[np.int32] = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._rows: dict[int, _Row] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._sampler = Sampler(processors)
        self._sampled_ids = SampledIds(max_num_seqs, loaded.device)
        self.forward_passes = ForwardPasses.of(
            ForwardParts(
                loaded.model,
                loaded.attention,
                self._sampled_ids,
                loaded.device,
                # Row numbers on the CPU can index a tensor on any device, such as that of the LM head.
                loaded.device if loaded.placement is None else torch.device("cpu"),
                loaded.dtype,
                block_size,
                max_num_seqs,
                max_model_len,
                self.adapter_memory,
            )
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its result."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step (see `Executor`)."""
        logits = self.forward(plan)
        sampling = [chunk for chunk in plan.chunks if chunk.sample]
        scoring = [chunk for chunk in plan.chunks if chunk.num_scored]
        num_sampled = sum(chunk.num_sampled for chunk in sampling)
        readback = Readback()
        scores = self._score(logits[num_sampled:], scoring, readback) if scoring else {}
        sampled = self._sample(logits[:num_sampled], sampling, readback) if sampling else None
        readback.close()
        rows = [self._rows[chunk.seq_id] for chunk in sampling]
        for index, (chunk, row) in enumerate(zip(sampling, rows, strict=True)):
            # With drafts the number of new tokens is known only with the result, and no step is launched before.
            if not chunk.draft_ids:
                row.num_pending += 1
                row.sampled_at = index
        if sampled is not None and num_sampled == len(sampling):
            self._sampled_ids.keep(sampled.token_ids)
        return LaunchedStep(self, sampling, rows, sampled, scores, readback)

    def _sample(self, logits: torch.Tensor, chunks: Sequence[Chunk], readback: Readback) -> SampledTokens:
        """Sample after the last token and after each draft, as if the drafts were accepted."""
        if self._vocab_size not in (None, logits.shape[1]):
            missing = self._vocab_size - logits.shape[1]
            logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        rows = [
            self._sampling_row(self._rows[chunk.seq_id], num_drafts)
            for chunk in chunks
            for num_drafts in range(chunk.num_sampled)
        ]
        return self._sampler.sample(logits, rows, readback)

    def _score(self, logits: torch.Tensor, chunks: Sequence[Chunk], readback: Readback) -> dict[int, Logprobs]:
        """Logprobs of the prompt tokens after the scored positions, from `logits` at these positions."""
        found: dict[int, Logprobs] = {}
        begin = 0
        for chunk in chunks:
            row = self._rows[chunk.seq_id]
            targets = self._tokens[row.index, chunk.score_begin + 1 : chunk.score_end + 1].astype(np.int64)
            counts = [row.sampling.params.prompt_logprobs or 0] * len(targets)
            scored = logits[begin : begin + len(targets)].float()
            [on_device] = to_device([targets], logits.device)
            found[chunk.seq_id] = gather(scored, on_device, counts, readback)
            begin += len(targets)
        return found

    def update_states(self, plan: StepPlan) -> None:
        """Apply the plan's changes: drop and add sequences, append their blocks and drafts."""
        self.forget(plan.dropped)
        for sequence in plan.new:
            self._add_sequence(sequence)
        for chunk in plan.chunks:
            row = self._rows[chunk.seq_id]
            end = chunk.num_held_blocks + len(chunk.new_block_ids)
            self._blocks[row.index, chunk.num_held_blocks : end] = chunk.new_block_ids
            self._tokens[row.index, row.num_tokens : row.num_tokens + len(chunk.draft_ids)] = chunk.draft_ids

    def settle(self, chunk: Chunk, row: _Row, token_ids: Sequence[int]) -> None:
        """Store the tokens sampled after a chunk, unless its sequence has been dropped."""
        if self._rows.get(chunk.seq_id) is row:
            row.num_pending -= not chunk.draft_ids
            self.correct(chunk.seq_id, chunk.start + chunk.num_tokens, token_ids)

    def correct(self, seq_id: int, start: int, token_ids: Sequence[int]) -> None:
        """Set a sequence's tokens from `start` on, and end it after them."""
        row = self._rows[seq_id]
        row.num_tokens = start + len(token_ids)
        self._tokens[row.index, start : row.num_tokens] = token_ids

    def forward(self, plan: StepPlan, first: ForwardPass | None = None) -> torch.Tensor:
        """Apply the plan's changes and run the model; return logits (rows, vocabulary).

        Rows: the last known token and the drafts of each sampling chunk, in the plan's order, then the scored positions
        of each chunk. `first`: try only this way to compute the step and those after it.
        """
        step, num_rows = self.pack(plan)
        return self.forward_passes.logits(step, first)[:num_rows]

    def pack(self, plan: StepPlan) -> tuple[PackedStep, int]:
        """Apply the plan's changes; return the inputs of its forward pass, and the number of rows of logits that it
        asks for."""
        self.update_states(plan)
        # Attention requires single tokens before longer chunks; `order` maps back to the plan's order.
        order = sorted(range(len(plan.chunks)), key=lambda index: plan.chunks[index].num_rows != 1)
        chunks = [plan.chunks[index] for index in order]
        input_ids, positions, firsts, metadata = self._inputs(chunks)
        first_of = dict(zip(order, firsts, strict=True))
        logit_rows: list[int] = []
        for index, chunk in enumerate(plan.chunks):
            if chunk.sample:
                logit_rows += range(first_of[index] + chunk.num_tokens - 1, first_of[index] + chunk.num_rows)
        for index, chunk in enumerate(plan.chunks):
            begin = first_of[index] - chunk.start
            logit_rows += range(begin + chunk.score_begin, begin + chunk.score_end)
        rows = np.array(logit_rows or [0], dtype=np.int64)
        return PackedStep(input_ids, positions, rows, metadata, self._adapter_batch(chunks)), len(logit_rows)

    def _adapter_batch(self, chunks: Sequence[Chunk]) -> AdapterBatch | None:
        """The rows with adapters of a packed batch, which has the chunks in this order."""
        slots = [self._rows[chunk.seq_id].adapter for chunk in chunks]
        if self.adapter_memory is None or not any(slots):
            return None
        return AdapterBatch.of(np.repeat(slots, [chunk.num_rows for chunk in chunks]))

    def is_long(self, num_tokens: int) -> bool:
        """Whether a sequence of this length has the rotary frequencies of long ones."""
        return self._rope_switch_length is not None and num_tokens > self._rope_switch_length

    def forget(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            self._free_rows.append(self._rows.pop(seq_id).index)

    def _add_sequence(self, sequence: NewSequence) -> None:
        index = self._free_rows.pop()
        count = len(sequence.token_ids)
        self._tokens[index, :count] = sequence.token_ids
        self._rows[sequence.seq_id] = _Row(
            index,
            self._sampler.start(sequence.params, sequence.choice, sequence.num_prompt_tokens),
            num_tokens=count,
            adapter=sequence.adapter,
            is_long=self.is_long(count),
        )

    def _inputs(
        self, chunks: Sequence[Chunk]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], AttentionMetadata]:
        """Token ids and positions of the packed batch, row of each chunk's first token, and attention metadata."""
        index = np.array([self._rows[chunk.seq_id].index for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.num_rows for chunk in chunks])
        ends = np.cumsum(counts)
        firsts = ends - counts
        rows = np.repeat(index, counts)
        positions = np.repeat(starts - firsts, counts) + np.arange(ends[-1])
        is_long = np.repeat([self._rows[chunk.seq_id].is_long for chunk in chunks], counts)
        num_blocks = -(-int((starts + counts).max()) // self._block_size)
        metadata = AttentionMetadata(
            starts=firsts.astype(np.int32),
            counts=counts.astype(np.int32),
            positions=starts.astype(np.int32),
            # Padded with blocks that the row held before, which are valid and masked out.
            block_table=self._blocks[index, :num_blocks],
            token_block=self._blocks[rows, positions // self._block_size],
            token_offset=(positions % self._block_size).astype(np.int32),
            is_long=is_long if is_long.any() else None,
        )
        input_ids = self._tokens[rows, positions].astype(np.int64)
        for chunk, first in zip(chunks, firsts.tolist(), strict=True):
            row = self._rows[chunk.seq_id]
            if chunk.start >= row.num_tokens:
                input_ids[first] = SampledIds.placeholder(row.sampled_at)
        return input_ids, positions, firsts, metadata

    def _sampling_row(self, row: _Row, num_drafts: int) -> SamplingRow:
        token_ids = self._tokens[row.index, : row.num_tokens + row.num_pending + num_drafts]
        return SamplingRow(row.sampling, token_ids)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step in flight on the device."""

    _runner: ModelRunner
    _chunks: Sequence[Chunk]
    """Chunks that sample."""
    _rows: Sequence[_Row]
    _sampled: SampledTokens | None
    _scores: dict[int, Logprobs]
    _readback: Readback

    def result(self) -> StepResult:
        """Wait for the step; keep the sampled tokens up to and including the first that differs from its draft."""
        self._readback.wait()
        sampled, scored = self._sampled.result() if self._sampled is not None else ([], [])
        token_ids: dict[int, list[int]] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        begin = 0
        for chunk, row in zip(self._chunks, self._rows, strict=True):
            num_accepted = 0
            for draft, token in zip(chunk.draft_ids, sampled[begin:], strict=False):
                if draft != token:
                    break
                num_accepted += 1
            kept = slice(begin, begin + num_accepted + 1)
            token_ids[chunk.seq_id] = sampled[kept]
            found = [item for item in scored[kept] if item is not None]
            if found:
                logprobs[chunk.seq_id] = found
            self._runner.settle(chunk, row, sampled[kept])
            begin += chunk.num_sampled
        return StepResult(
            token_ids,
            logprobs,
            prompt_logprobs={seq_id: scores.to_list() for seq_id, scores in self._scores.items()},
            num_drafts={chunk.seq_id: len(chunk.draft_ids) for chunk in self._chunks if chunk.draft_ids},
            failed={
                chunk.seq_id: row.sampling.failures[0]
                for chunk, row in zip(self._chunks, self._rows, strict=True)
                if row.sampling.failures
            },
        )
