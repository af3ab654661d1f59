"""The number of drafts for each sequence that maximises the expected tokens per second.

Known are the duration of a step by its number of tokens (speed.py), and the acceptance rates of each sequence's drafts.
A sequence with k drafts yields 1 + p + p a + ... + p a^(k-1) tokens on average, where p is the acceptance rate of the
first draft of a step, and a that of a further draft after an accepted one. Drafts are chosen in the order of their
expected gain, as many as maximise (tokens of all sequences) / (duration of the step). A full batch on a CPU, where each
token takes its time, gets none; a single sequence, for which the weights are read anyway, gets many.

Rates of sequences without drafts are unknown, and rates change. So there is an account in seconds: it earns a small
share of the time of all steps; each accepted draft earns the time of a token without drafts; each draft costs the time
that it adds to the step. Where steps overlap (core.py), waiting for the tokens that drafts depend on costs too, whether
drafts are found or not. Below zero there are no drafts; above it a sequence that would get none is tried now and then.
So speculation loses no more than that share, whatever the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_EARNED_SHARE = 0.02
_MAX_STEPS_HELD = 8.0
"""Maximum balance of the account, in steps, so that a bad phase cannot lose all that a good one earned."""
_STEPS_AT_START = 2.0
_MARGIN = 1.02
"""Required ratio of the expected speed to that without drafts, because durations and rates are estimates."""
_NUM_TRIED = 2
"""Drafts of a sequence that is tried."""
_MAX_FURTHER_RATE = 0.95
"""Assumed maximum acceptance rate of further drafts."""
_NUM_COUNTS = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of drafts in a step that are compared."""


@dataclass(slots=True)
class Acceptance:
    """Decaying counts of accepted drafts: of the first draft of a step, and of those after an accepted one."""

    decay: float
    first_accepted: float = 0.0
    first_tried: float = 0.0
    further_accepted: float = 0.0
    further_tried: float = 0.0

    def record(self, num_drafts: int, num_accepted: int) -> None:
        """Count a step's drafts up to the first rejected one."""
        self.first_accepted = self.first_accepted * self.decay + (num_accepted > 0)
        self.first_tried = self.first_tried * self.decay + 1
        if num_accepted > 0:
            self.further_accepted = self.further_accepted * self.decay + num_accepted - 1
            self.further_tried = self.further_tried * self.decay + min(num_drafts - 1, num_accepted)


@dataclass(frozen=True, slots=True)
class AcceptanceRates:
    """Probability that the first draft is accepted, and a further one after an accepted one."""

    first: float
    further: float


@dataclass(frozen=True, slots=True)
class Offer:
    """Drafts that are available for a sequence."""

    seq_id: int
    max_drafts: int
    rates: AcceptanceRates


class DraftBudget:
    """`step_s(tokens)`: duration of a step; `draft_step_s(sequences)`: of a draft model's step of one token each."""

    def __init__(self, step_s: Callable[[int], float], draft_step_s: Callable[[int], float] | None = None) -> None:
        self._step_s = step_s
        self._draft_step_s = draft_step_s or (lambda _: 0.0)
        self._acceptances: dict[int, Acceptance] = {}
        # Prior for all sequences: half of the first drafts and most of the further ones are accepted.
        self._overall = Acceptance(0.98, first_accepted=2.0, first_tried=4.0, further_accepted=3.0, further_tried=4.0)
        self._balance_s = _STEPS_AT_START * step_s(1)

    @property
    def balance_s(self) -> float:
        return self._balance_s

    def acceptance_rates(self, seq_id: int) -> AcceptanceRates:
        """A sequence's own rates, smoothed towards those of all sequences while it has had few drafts."""
        overall = self._overall
        first = overall.first_accepted / overall.first_tried
        further = overall.further_accepted / overall.further_tried
        own = self._acceptances.get(seq_id)
        if own is not None:
            first = (own.first_accepted + first) / (own.first_tried + 1)
            further = (own.further_accepted + further) / (own.further_tried + 1)
        return AcceptanceRates(first, further)

    def min_first(self, num_sequences: int, max_drafts: int) -> float:
        """Minimum acceptance rate of the first draft at which drafts can pay for one sequence of a batch."""
        if self._balance_s < 0:
            return float("inf")
        step_s = self._step_s(num_sequences)
        lowest, promised = float("inf"), 0.0
        for count in range(1, max_drafts + 1):
            promised += _MAX_FURTHER_RATE ** (count - 1)
            extra_s = self._extra_s(num_sequences, count, depth=count, width=1)
            lowest = min(lowest, ((1 + extra_s / step_s) * _MARGIN - 1) * num_sequences / promised)
        return lowest

    def allot(self, num_sequences: int, offers: Sequence[Offer], budget: int) -> list[int]:
        """Number of drafts for each offer, at most `budget` in all, in a step of `num_sequences` sequences."""
        gains = [
            (offer.rates.first * offer.rates.further**depth, -depth, index)
            for index, offer in enumerate(offers)
            for depth in range(offer.max_drafts)
        ]
        gains.sort(reverse=True)
        best_count = 0
        best_speed = _MARGIN * num_sequences / self._step_s(num_sequences)
        promised, depth, width, taken = 0.0, 0, 0, 0
        for count in self._counts(min(budget, len(gains))):
            for gain, negative_depth, _ in gains[taken:count]:
                promised += gain
                depth = max(depth, 1 - negative_depth)
                width += negative_depth == 0
            taken = count
            cost_s = self._step_s(num_sequences) + self._extra_s(num_sequences, count, depth, width)
            speed = (num_sequences + promised) / cost_s
            if speed > best_speed:
                best_count, best_speed = count, speed
        counts = [0] * len(offers)
        for _, _, index in gains[:best_count]:
            counts[index] += 1
        return counts

    @staticmethod
    def _counts(max_drafts: int) -> Sequence[int]:
        fewer = _NUM_COUNTS[: bisect_left(_NUM_COUNTS, max_drafts)]
        return (*fewer, max_drafts) if max_drafts else ()

    def num_tried(self, num_sequences: int) -> int:
        """Number of drafts to try on a sequence for which they are not expected to pay; 0: none now."""
        risk_s = self._extra_s(num_sequences, _NUM_TRIED, depth=_NUM_TRIED, width=1)
        return _NUM_TRIED if self._balance_s >= risk_s else 0

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        """Update with a step: the number of sequences that sampled tokens, and (drafts, accepted drafts) of those that
        had drafts."""
        step_s = self._step_s(num_sequences)
        num_drafts = sum(drafts for drafts, _ in tried.values())
        num_accepted = sum(accepted for _, accepted in tried.values())
        depth = max((drafts for drafts, _ in tried.values()), default=0)
        extra_s = self._extra_s(num_sequences, num_drafts, depth, len(tried)) if tried else 0.0
        change_s = _EARNED_SHARE * step_s + num_accepted * step_s / num_sequences - extra_s
        self._balance_s = min(self._balance_s + change_s, _MAX_STEPS_HELD * step_s)
        for seq_id, (drafts, accepted) in tried.items():
            own = self._acceptances.setdefault(seq_id, Acceptance(0.85))
            own.record(drafts, accepted)
            self._overall.record(drafts, accepted)

    def charge(self, seconds: float) -> None:
        """Charge the account with time spent on speculation other than for the drafts themselves."""
        self._balance_s -= seconds

    def forget(self, seq_id: int) -> None:
        self._acceptances.pop(seq_id, None)

    def _extra_s(self, num_sequences: int, num_drafts: int, depth: int, width: int) -> float:
        """Seconds that drafts add to a step: verifying, and `depth` steps of the draft model for `width` sequences."""
        check_s = self._step_s(num_sequences + num_drafts) - self._step_s(num_sequences)
        return check_s + depth * self._draft_step_s(width)
