"""Joins where drafts come from (a `Proposer`) with how many are worth their time (`DraftBudget`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.engine.plan import OPEN_DRAFT
from fastserve.engine.speculation.draft_budget import DraftBudget, Offer


class Proposer(Protocol):
    """Where drafts come from. Called for each sequence in each step, so a call may take microseconds only."""

    def propose(self, seq_id: int, token_ids: Sequence[int], most: int) -> list[int]:
        """Guess at up to `most` tokens that follow; none where there is nothing to go by.

        `token_ids` are all tokens of the sequence; between two calls they only grow.
        """
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence has ended. An unknown one is no error."""
        ...


class OpenProposer:
    """Leaves the guesses to the draft model, which runs beside the model and not beside the scheduler."""

    def propose(self, seq_id: int, token_ids: Sequence[int], most: int) -> list[int]:
        return [OPEN_DRAFT] * most

    def forget(self, seq_id: int) -> None:
        pass


class DraftRequest(Protocol):
    """A sequence that samples a token in this step."""

    @property
    def seq_id(self) -> int: ...

    @property
    def token_ids(self) -> list[int]: ...


class Speculator:
    """What the scheduler asks for drafts."""

    def __init__(self, proposer: Proposer, controller: DraftBudget, num_speculative_tokens: int) -> None:
        self._proposer = proposer
        self._controller = controller
        self._most = num_speculative_tokens
        self._turn = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0

    def draft(self, sequences: Sequence[DraftRequest], limits: Sequence[int], budget: int) -> dict[int, list[int]]:
        """Drafts for some of the sequences that sample a token in this step: at most `limits` each, `budget` in all."""
        if not sequences:
            return {}
        num_sequences = len(sequences)
        least_first = self._controller.least_first(num_sequences, min(self._most, budget))
        if least_first > 1:
            return self._try_one(sequences, limits, budget)
        offers: list[Offer] = []
        drafts: dict[int, list[int]] = {}
        for sequence, limit in zip(sequences, limits, strict=True):
            outlook = self._controller.outlook(sequence.seq_id)
            if outlook.first < least_first or limit <= 0:
                continue
            found = self._proposer.propose(sequence.seq_id, sequence.token_ids, min(limit, self._most))
            if found:
                drafts[sequence.seq_id] = found
                offers.append(Offer(sequence.seq_id, len(found), outlook))
        counts = self._controller.allot(num_sequences, offers, budget)
        drafts = {
            offer.seq_id: drafts[offer.seq_id][:count] for offer, count in zip(offers, counts, strict=True) if count
        }
        return drafts or self._try_one(sequences, limits, budget)

    def _try_one(self, sequences: Sequence[DraftRequest], limits: Sequence[int], budget: int) -> dict[int, list[int]]:
        """A few drafts for the next in turn: perhaps they pay by now."""
        self._turn += 1
        at = self._turn % len(sequences)
        most = min(self._controller.num_tried(len(sequences)), limits[at], budget, self._most)
        if most <= 0:
            return {}
        seq_id = sequences[at].seq_id
        found = self._proposer.propose(seq_id, sequences[at].token_ids, most)
        return {seq_id: found} if found else {}

    def is_worth_waiting(self, sequences: Sequence[DraftRequest]) -> bool:
        """Whether the step in which these sample a token had better be planned once their tokens are known, with
        drafts, than before, without. What the waiting costs is to be charged."""
        if not sequences:
            return False
        num_sequences = len(sequences)
        least_first = self._controller.least_first(num_sequences, self._most)
        return self._controller.num_tried(num_sequences) > 0 or any(
            self._controller.outlook(sequence.seq_id).first >= least_first for sequence in sequences
        )

    def charge(self, seconds: float) -> None:
        """Time in which the device stood still so that drafts could be found."""
        self._controller.charge(seconds)

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        """After a step: how many sequences could have had drafts, and (drafts, right ones) of those that had."""
        if num_sequences == 0:
            return
        self._controller.learn(num_sequences, tried)
        self.draft_tokens += sum(drafts for drafts, _ in tried.values())
        self.accepted_tokens += sum(right for _, right in tried.values())

    def forget(self, seq_id: int) -> None:
        self._proposer.forget(seq_id)
        self._controller.forget(seq_id)
