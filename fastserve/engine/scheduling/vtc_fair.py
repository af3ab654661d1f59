"""Fair shares of the engine for each client (virtual token counters: Sheng et al., Fairness in Serving Large Language
Models, 2023). A client is an adapter; requests for the bare base model are one client too.

A counter has the client's service: INPUT_PRICE for each prompt token that was computed, OUTPUT_PRICE for each token of
an answer, divided by its weight (`--fair-weights`). The client with the lowest counter is served next, its requests in
their own order, and the one with the highest counter is preempted. A client that had no request to start begins at most
CREDIT_STEPS full steps below the lowest counter of those that have: it cannot save up more service, and short bursts of
a client that asks for little go first.

A prompt waits for the next step where this one has a prompt of a client that is behind by more than half of the credit.
So a client with many requests does not make the steps long in which others get their first token. Nor those in which
they come: beside others, the client with the highest counter gets a quarter of a step for its prompts, or half of it
for one.

When all places (`--max-num-seqs`) are taken, a new request of a client with fewer places and less service gets one of
the client with the most places. Places are compared per weight; equal ones never move.

While two clients of weight 1 have waiting requests, their services differ by at most 2 (max(INPUT_PRICE times the
longest prompt, OUTPUT_PRICE times the tokens that the KV cache holds) + the credit).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

from fastserve.engine.scheduling import Settings
from fastserve.engine.scheduling.queue import WaitingQueue
from fastserve.engine.sequence import Sequence

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
CREDIT_STEPS = 2.0
"""Credit of a client that comes back: the service of this many steps with `--max-num-batched-tokens` prompt tokens."""
AHEAD_SHARE = 4
"""The client ahead of all gets one part of this many of a step's tokens for several prompts, twice that for one."""
RECENT_STEPS = 16.0
"""While others were served within the service of this many full steps; else it has the whole step."""
MAX_IDLE_CLIENTS = 10_000
"""Clients without requests whose counters are kept."""


@dataclass(slots=True, eq=False)
class _Client:
    name: str
    weight: float
    counter: float = 0.0
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    unstarted: set[int] = field(default_factory=set)
    """Ids of sequences that have never been started, also while they are held back."""
    num_requests: int = 0
    is_queued: bool = False
    """Whether it is in the heap of clients."""


class Policy:
    def __init__(self, settings: Settings) -> None:
        self._weights = settings.weights
        self._clients: dict[str, _Client] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        """Clients without requests; the first has been idle longest."""
        self._queue: list[tuple[float, str]] = []
        """A heap of clients with waiting sequences, by counters that may have grown since."""
        self._known: set[int] = set()
        """Ids of sequences that have not ended."""
        self._credit = CREDIT_STEPS * settings.max_num_batched_tokens
        self._level = 0.0
        """Highest of the lowest counters, each among clients with waiting sequences. Never falls."""
        self._ahead_tokens = max(1, settings.max_num_batched_tokens // AHEAD_SHARE)
        self._recent = RECENT_STEPS * settings.max_num_batched_tokens
        self._service = 0.0
        """Total service of all clients, before it is divided by their weights."""
        self._highest = 0.0
        """The highest counter of a client."""
        self._behind_at = -math.inf
        """The service of all when a client was last served that had less than another."""

    def add(self, sequence: Sequence) -> None:
        client = self._client(sequence)
        if sequence.seq_id not in self._known:
            self._known.add(sequence.seq_id)
            if not client.unstarted:
                self._lowest()
                client.counter = max(client.counter, self._level - self._credit / client.weight)
            client.unstarted.add(sequence.seq_id)
            client.num_requests += 1
            self._idle.pop(client.name, None)
        client.waiting.add(sequence.order, sequence)
        if not client.is_queued:
            client.is_queued = True
            heapq.heappush(self._queue, (client.counter, client.name))

    def remove(self, sequence: Sequence) -> None:
        client = self._clients.get(sequence.request.adapter)
        if client is not None:
            client.waiting.remove(sequence)

    def first(self, running: AnySequence[Sequence]) -> Sequence | None:
        client = self._lowest()
        return None if client is None else client.waiting.first()

    def victim(self, running: AnySequence[Sequence]) -> Sequence:
        return max(running, key=lambda item: (self._client(item).counter, *item.order))

    def yields_to(self, first: Sequence, running: AnySequence[Sequence]) -> Sequence | None:
        """The last sequence of the client with the most places for its weight, if that has had more service than the
        client of `first`, and has as many places at least when one is moved."""
        if first.is_begun:
            return None
        numbers = Counter(item.request.adapter for item in running)
        name = max(numbers, key=lambda item: numbers[item] / self._clients[item].weight)
        heavy, client = self._clients[name], self._client(first)
        places = numbers[client.name] + 1
        if (numbers[name] - 1) / heavy.weight < places / client.weight or heavy.counter <= client.counter:
            return None
        return next(item for item in reversed(running) if item.request.adapter == name)

    def max_prefill_tokens(self, sequence: Sequence, prefills: AnySequence[tuple[Sequence, int]]) -> int:
        """None beside the prompt of a client that is behind by more than half of the credit: they would make the step,
        and so that client's time to the first token, longer. The client ahead of all gets a part of a step alone: a
        request of another, which comes in the middle of the step, waits for its end."""
        client, num_own = self._client(sequence), 0
        for other, count in prefills:
            its = self._client(other)
            if its is client:
                num_own += count
            elif its.counter + self._credit / 2 / its.weight < client.counter:
                return 0
        is_ahead = client.counter >= self._highest and self._service - self._behind_at <= self._recent
        if not is_ahead:
            return sequence.num_tokens
        # One prompt is not cut into small parts: steps that start no request cost throughput.
        return max(0, self._ahead_tokens - num_own) if num_own else 2 * self._ahead_tokens

    def served(self, sequence: Sequence, num_input_tokens: int, num_output_tokens: int) -> None:
        client = self._client(sequence)
        client.unstarted.discard(sequence.seq_id)
        service = INPUT_PRICE * num_input_tokens + OUTPUT_PRICE * num_output_tokens
        client.counter += service / client.weight
        self._service += service
        if client.counter < self._highest:
            self._behind_at = self._service
        self._highest = max(self._highest, client.counter)

    def ended(self, sequence: Sequence) -> None:
        if sequence.seq_id not in self._known:
            return
        self._known.discard(sequence.seq_id)
        client = self._client(sequence)
        client.unstarted.discard(sequence.seq_id)
        client.num_requests -= 1
        if not client.num_requests:
            self._idle[client.name] = None
            while len(self._idle) > MAX_IDLE_CLIENTS:
                name, _ = self._idle.popitem(last=False)
                del self._clients[name]

    def too_late(self, now_s: float) -> AnySequence[Sequence]:
        return ()

    def _client(self, sequence: Sequence) -> _Client:
        name = sequence.request.adapter
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(name, self._weights.get(name, 1.0))
        return client

    def _lowest(self) -> _Client | None:
        """The client with the lowest counter of those with waiting sequences."""
        while self._queue:
            counter, name = self._queue[0]
            client = self._clients.get(name)
            if client is None or not client.waiting:
                heapq.heappop(self._queue)
                if client is not None:
                    client.is_queued = False
            elif client.counter > counter:
                heapq.heapreplace(self._queue, (client.counter, name))
            else:
                self._level = max(self._level, counter)
                return client
        return None
