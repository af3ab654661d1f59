"""Drafts of the tokens that a grammar forces next: they are always accepted, so several tokens cost one step.

Other drafts of sequences with a grammar are cut where they break it.
"""

from __future__ import annotations

from fastserve.engine.grammars import GrammarState, GrammarStore
from fastserve.engine.sequence import Sequence
from fastserve.engine.speculation.speculator import Speculator

_MAX_FORCED = 32
"""Tokens in one step; each takes a row of the vocabulary's size."""


class ForcedTokens:
    """The scheduler's source of drafts (see `Drafting` in scheduler.py): forced tokens, then those of a speculator."""

    def __init__(self, grammars: GrammarStore, speculator: Speculator | None) -> None:
        self._grammars = grammars
        self._speculator = speculator
        self._states: dict[int, GrammarState] = {}
        self._forced: set[int] = set()
        """Sequences with forced tokens in the step that was planned last."""

    def draft(self, sequences: list[Sequence], limits: list[int], budget: int) -> dict[int, list[int]]:
        self._forced.clear()
        drafts: dict[int, list[int]] = {}
        others: list[Sequence] = []
        other_limits: list[int] = []
        for sequence, limit in zip(sequences, limits, strict=True):
            forced: list[int] = []
            if sequence.request.params.grammar and limit > 0 and budget > 0:
                state = self._follow(sequence)
                max_drafts = state.max_drafts()
                if max_drafts is not None:
                    limit = min(limit, max_drafts)
                forced = state.matcher.compute_ff_tokens()[: min(limit, budget, _MAX_FORCED)]
            if forced:
                drafts[sequence.seq_id] = forced
                self._forced.add(sequence.seq_id)
                budget -= len(forced)
            else:
                others.append(sequence)
                other_limits.append(limit)
        if self._speculator is not None and others and budget > 0:
            for seq_id, found in self._speculator.draft(others, other_limits, budget).items():
                known = self._states.get(seq_id)
                count = len(found) if known is None else known.matcher.deep_copy().try_consume_tokens(found)
                if count:
                    drafts[seq_id] = found[:count]
        return drafts

    def _follow(self, sequence: Sequence) -> GrammarState:
        state = self._states.get(sequence.seq_id)
        if state is None:
            state = self._states[sequence.seq_id] = self._start(sequence)
        # Where that fails, the sampler finds the same, and the request ends.
        state.extend(sequence.token_ids[sequence.num_prompt_tokens + state.num_tokens :])
        return state

    def _start(self, sequence: Sequence) -> GrammarState:
        params = sequence.request.params
        return GrammarState(self._grammars, params.grammar, params.thinking)

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        if self._speculator is not None:
            others = {seq_id: counts for seq_id, counts in tried.items() if seq_id not in self._forced}
            self._speculator.learn(num_sequences - (len(tried) - len(others)), others)

    def expect(self, seq_id: int, predicted_ids: list[int], num_prompt_tokens: int) -> None:
        if self._speculator is not None:
            self._speculator.expect(seq_id, predicted_ids, num_prompt_tokens)

    def forget(self, seq_id: int) -> None:
        self._states.pop(seq_id, None)
        if self._speculator is not None:
            self._speculator.forget(seq_id)
