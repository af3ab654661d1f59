"""How many drafts each sequence gets, so that the expected tokens per second are most.

Two things are known: what a step costs by its number of tokens (speed.py), and how often drafts of each sequence were
right. A sequence with k drafts brings 1 + p + p a + ... + p a^(k-1) tokens, p being how often the first draft of a step
is right and a how often a further one is after a right one. Drafts are taken in the order of what they promise, as
many as make (tokens of all sequences) / (cost of the step) largest. A full batch on a CPU, where each token costs its
time, gets none; one sequence, for which the weights are read anyway, gets many.

What is never tried is never learnt, and what is learnt may change. So there is an account in seconds: it earns a small
share of the time that steps take, each right draft is credited with the time that a token costs without drafts, and
each draft is charged with what it adds to the step. Where steps overlap (core.py), waiting for the tokens that drafts
go by is charged too, whether any are found or not. Below zero nothing is drafted, above it a sequence that would get
nothing is tried now and then. So speculation loses no more than that share, whatever the text does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_EARNED_SHARE = 0.02
_MOST_STEPS_HELD = 8.0
"""Balance of the account, in steps: what a good time earned is not to be lost wholly in a bad one."""
_STEPS_AT_START = 2.0
_MARGIN = 1.02
"""Drafts must promise this many times the speed without: costs and rates are estimates."""
_NUM_TRIED = 2
"""Drafts of a sequence that is tried."""
_FURTHER_AT_BEST = 0.95
_NUM_COUNTS = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Numbers of drafts in a step that are weighed against each other."""


@dataclass(slots=True)
class Acceptance:
    """How often drafts were right, old ones counting less: the first of a step, and any after a right one."""

    decay: float
    first_right: float = 0.0
    first_tried: float = 0.0
    further_right: float = 0.0
    further_tried: float = 0.0

    def record(self, num_drafts: int, num_right: int) -> None:
        """Drafts after the first wrong one tell nothing."""
        self.first_right = self.first_right * self.decay + (num_right > 0)
        self.first_tried = self.first_tried * self.decay + 1
        if num_right > 0:
            self.further_right = self.further_right * self.decay + num_right - 1
            self.further_tried = self.further_tried * self.decay + min(num_drafts - 1, num_right)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Probability that the first draft is right, and a further one after a right one."""

    first: float
    further: float


@dataclass(frozen=True, slots=True)
class Offer:
    """Drafts that a sequence could be given."""

    seq_id: int
    most: int
    outlook: Outlook


class DraftBudget:
    """`step_s(tokens)` is what a step costs, `draft_step_s(sequences)` what one token of each costs the draft model."""

    def __init__(self, step_s: Callable[[int], float], draft_step_s: Callable[[int], float] | None = None) -> None:
        self._step_s = step_s
        self._draft_step_s = draft_step_s or (lambda _: 0.0)
        self._acceptances: dict[int, Acceptance] = {}
        # What is known of no sequence in particular: half of the first drafts and most of the further ones are right.
        self._overall = Acceptance(0.98, first_right=2.0, first_tried=4.0, further_right=3.0, further_tried=4.0)
        self._balance_s = _STEPS_AT_START * step_s(1)

    @property
    def balance_s(self) -> float:
        return self._balance_s

    def outlook(self, seq_id: int) -> Outlook:
        """A sequence's own rates, drawn towards those of all as long as there is little of its own."""
        overall = self._overall
        first = overall.first_right / overall.first_tried
        further = overall.further_right / overall.further_tried
        own = self._acceptances.get(seq_id)
        if own is not None:
            first = (own.first_right + first) / (own.first_tried + 1)
            further = (own.further_right + further) / (own.further_tried + 1)
        return Outlook(first, further)

    def least_first(self, num_sequences: int, most: int) -> float:
        """Below this probability of the first draft, no number of drafts pays for one sequence of the batch."""
        if self._balance_s < 0:
            return float("inf")
        step_s = self._step_s(num_sequences)
        least, promised = float("inf"), 0.0
        for count in range(1, most + 1):
            promised += _FURTHER_AT_BEST ** (count - 1)
            extra_s = self._extra_s(num_sequences, count, depth=count, width=1)
            least = min(least, ((1 + extra_s / step_s) * _MARGIN - 1) * num_sequences / promised)
        return least

    def allot(self, num_sequences: int, offers: Sequence[Offer], budget: int) -> list[int]:
        """Drafts for each offer, at most `budget` together, in a step in which `num_sequences` sample a token."""
        gains = [
            (offer.outlook.first * offer.outlook.further**depth, -depth, index)
            for index, offer in enumerate(offers)
            for depth in range(offer.most)
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
    def _counts(most: int) -> Sequence[int]:
        fewer = _NUM_COUNTS[: bisect_left(_NUM_COUNTS, most)]
        return (*fewer, most) if most else ()

    def num_tried(self, num_sequences: int) -> int:
        """Drafts that may be risked on a sequence for which they do not seem to pay; 0: none now."""
        risk_s = self._extra_s(num_sequences, _NUM_TRIED, depth=_NUM_TRIED, width=1)
        return _NUM_TRIED if self._balance_s >= risk_s else 0

    def learn(self, num_sequences: int, tried: dict[int, tuple[int, int]]) -> None:
        """Take in a step: how many sequences sampled tokens, and (drafts, right ones) of those that had drafts."""
        step_s = self._step_s(num_sequences)
        num_drafts = sum(drafts for drafts, _ in tried.values())
        num_right = sum(right for _, right in tried.values())
        depth = max((drafts for drafts, _ in tried.values()), default=0)
        extra_s = self._extra_s(num_sequences, num_drafts, depth, len(tried)) if tried else 0.0
        change_s = _EARNED_SHARE * step_s + num_right * step_s / num_sequences - extra_s
        self._balance_s = min(self._balance_s + change_s, _MOST_STEPS_HELD * step_s)
        for seq_id, (drafts, right) in tried.items():
            own = self._acceptances.setdefault(seq_id, Acceptance(0.85))
            own.record(drafts, right)
            self._overall.record(drafts, right)

    def charge(self, seconds: float) -> None:
        """Take what was spent on speculation beside the drafts themselves from the account."""
        self._balance_s -= seconds

    def forget(self, seq_id: int) -> None:
        self._acceptances.pop(seq_id, None)

    def _extra_s(self, num_sequences: int, num_drafts: int, depth: int, width: int) -> float:
        """What drafts add to a step: checking them, and `depth` steps of the draft model for `width` sequences."""
        check_s = self._step_s(num_sequences + num_drafts) - self._step_s(num_sequences)
        return check_s + depth * self._draft_step_s(width)
