"""Combines the source of drafts (a `Proposer`) with the number that pays (`DraftBudget`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.engine.plan import DRAFT_PLACEHOLDER
from fastserve.engine.speculation.draft_budget import DraftBudget, Offer


class Proposer(Protocol):
    """A source of drafts. Called for each sequence in each step, so a call may take microseconds only."""

    def propose(self, seq_id: int, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        """Up to `max_drafts` drafts of the next tokens; empty when none are found.

        `token_ids`: all tokens of the sequence; they only grow between calls.
        """
        ...

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take note of a new sequence's predicted answer."""
        ...

    def forget(self, seq_id: int) -> None:
        """Drop the state of a sequence. Unknown ones are ignored."""
        ...


class PlaceholderProposer:
    """Proposes placeholders, which the draft model replaces when the step is executed."""

    def propose(self, seq_id: int, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        return [DRAFT_PLACEHOLDER] * max_drafts

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        pass  # the draft model's tokens are used

    def forget(self, seq_id: int) -> None:
        pass


class DraftRequest(Protocol):
    """A sequence that samples a token in this step."""

    @property
    def seq_id(self) -> int: ...

    @property
    def token_ids(self) -> list[int]: ...


class Speculator:
    """Provides the scheduler with drafts."""

    def __init__(self, proposer: Proposer, draft_budget: DraftBudget, num_speculative_tokens: int) -> None:
        self._proposer = proposer
        self._draft_budget = draft_budget
        self._num_speculative_tokens = num_speculative_tokens
        self._next_tried = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0

    @property
    def fills_later(self) -> bool:
        """Whether its drafts are placeholders for those of a draft model."""
        return isinstance(self._proposer, PlaceholderProposer)

    def draft(self, sequences: Sequence[DraftRequest], limits: Sequence[int], budget: int) -> dict[int, list[int]]:
        """Drafts for some of the sequences that sample a token in this step: at most `limits` each, `budget` in all."""
        if not sequences:
            return {}
        num_sequences = len(sequences)
        min_first = self._draft_budget.min_first(num_sequences, min(self._num_speculative_tokens, budget))
        if min_first > 1:
            return self._try_one(sequences, limits, budget)
        offers: list[Offer] = []
        drafts: dict[int, list[int]] = {}
        for sequence, limit in zip(sequences, limits, strict=True):
            rates = self._draft_budget.acceptance_rates(sequence.seq_id)
            if rates.first < min_first or limit <= 0:
                continue
            found = self._proposer.propose(
                sequence.seq_id, sequence.token_ids, min(limit, self._num_speculative_tokens)
            )
            if found:
                drafts[sequence.seq_id] = found
                offers.append(Offer(sequence.seq_id, len(found), rates))
        counts = self._draft_budget.allot(num_sequences, offers, budget)
        drafts = {
            offer.seq_id: drafts[offer.seq_id][:count] for offer, count in zip(offers, counts, strict=True) if count
        }
        return drafts or self._try_one(sequences, limits, budget)

    def _try_one(self, sequences: Sequence[DraftRequest], limits: Sequence[int], budget: int) -> dict[int, list[int]]:
        """A few drafts for one sequence, round-robin, to find out whether they pay by now."""
        self._next_tried += 1
        at = self._next_tried % len(sequences)
        max_drafts = min(self._draft_budget.num_tried(len(sequences)), limits[at], budget, self._num_speculative_tokens)
        if max_drafts <= 0:
            return {}
        seq_id = sequences[at].seq_id
        found = self._proposer.propose(seq_id, sequences[at].token_ids, max_drafts)
        return {seq_id: found} if found else {}

    def is_worth_waiting(self, sequences: Sequence[DraftRequest]) -> bool:
        """Whether it pays to plan the next step of these sequences with drafts, once their last tokens are known,
        rather than earlier without. The caller must `charge` the time of waiting."""
        if not sequences:
            return False
        num_sequences = len(sequences)
        min_first = self._draft_budget.min_first(num_sequences, self._num_speculative_tokens)
        return self._draft_budget.num_tried(num_sequences) > 0 or any(
            self._draft_budget.acceptance_rates(sequence.seq_id).first >= min_first for sequence in sequences
        )

    def charge(self, seconds: float) -> None:
        """Charge time in which the device was idle because of drafts."""
        self._draft_budget.charge(seconds)

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        """Update with a step: the number of sequences that could have had drafts, and (drafts, accepted drafts) of
        those that had some."""
        if num_sequences == 0:
            return
        self._draft_budget.learn(num_sequences, tried)
        self.draft_tokens += sum(drafts for drafts, _ in tried.values())
        self.accepted_tokens += sum(accepted for _, accepted in tried.values())

    def expect(self, seq_id: int, predicted_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._proposer.expect(seq_id, predicted_ids, num_prompt_tokens)

    def forget(self, seq_id: int) -> None:
        self._proposer.forget(seq_id)
        self._draft_budget.forget(seq_id)
