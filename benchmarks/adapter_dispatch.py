"""How far a worker that has an adapter in memory may be ahead in load and still get the adapter's next request:
`python -m benchmarks.adapter_dispatch`.

A simulation of the controller's rule (MAX_HOLDER_LEAD in fastserve/control/choice.py) with power-law adapters.
Workers run a number of requests at once, the others wait in order of arrival; a request whose adapter is not in a
worker's memory waits until it is read, and then the least recently used adapter is dropped. The controller knows what
workers hold as of their last heartbeat. Wait: from arrival to the start of the prefill. It takes seconds, anywhere.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

LEADS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
NUM_WORKERS = 8
SLOTS = 16
"""Requests that a worker runs at once."""
HELD = 16
"""Adapters in a worker's memory."""
SERVICE_S = 2.0
"""Mean duration of a request; exponential."""
HEARTBEAT_S = 1.0
WARM_UP = 0.2
"""Share of the requests that are not counted."""


@dataclass
class Worker:
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    reported: frozenset[int] = frozenset()
    """Adapters of the last heartbeat."""
    running: int = 0
    waiting: deque[tuple[float, int, float, bool]] = field(default_factory=deque)
    """Arrival, adapter, duration, and whether the request is counted."""

    @property
    def in_flight(self) -> int:
        return self.running + len(self.waiting)

    def use(self, adapter: int) -> bool:
        """Whether the adapter is in memory; it is afterwards."""
        hit = adapter in self.held
        self.held[adapter] = None
        self.held.move_to_end(adapter)
        if len(self.held) > HELD:
            self.held.popitem(last=False)
        return hit


@dataclass(frozen=True)
class Outcome:
    hit_rate: float
    mean_wait_s: float
    p99_wait_s: float


def choose(workers: list[Worker], adapter: int, lead: float, rng: random.Random) -> Worker:
    order = {id(worker): rng.random() for worker in workers}
    best = min(workers, key=lambda worker: (worker.in_flight, order[id(worker)]))
    holders = [worker for worker in workers if adapter in worker.reported]
    holder = min(holders, key=lambda worker: (worker.in_flight, order[id(worker)]), default=best)
    return holder if holder.in_flight <= best.in_flight + lead else best


def simulate(lead: float, utilization: float, load_s: float, alpha: float, num_adapters: int, requests: int) -> Outcome:
    """The same arrivals for each lead."""
    rng = random.Random(1)
    weights = [1 / rank**alpha for rank in range(1, num_adapters + 1)]
    rate = utilization * NUM_WORKERS * SLOTS / SERVICE_S
    workers = [Worker() for _ in range(NUM_WORKERS)]
    events: list[tuple[float, int, str, int]] = []
    numbers: Iterator[int] = itertools.count()
    now = 0.0
    arrivals: list[tuple[int, float]] = []
    for index, adapter in enumerate(rng.choices(range(num_adapters), weights, k=requests)):
        now += rng.expovariate(rate)
        arrivals.append((adapter, rng.expovariate(1 / SERVICE_S)))
        events.append((now, next(numbers), "arrival", index))
    for at, _ in enumerate(workers):
        events.append((rng.random() * HEARTBEAT_S, next(numbers), "heartbeat", at))
    heapq.heapify(events)
    waits: list[float] = []
    hits = 0

    def start(at: int, now: float) -> None:
        nonlocal hits
        worker = workers[at]
        while worker.waiting and worker.running < SLOTS:
            arrived, adapter, duration, is_counted = worker.waiting.popleft()
            hit = worker.use(adapter)
            read_s = 0.0 if hit else load_s
            worker.running += 1
            heapq.heappush(events, (now + read_s + duration, next(numbers), "end", at))
            if is_counted:
                hits += hit
                waits.append(now + read_s - arrived)

    left = requests
    choices = random.Random(2)
    while left:
        now, _, kind, value = heapq.heappop(events)
        if kind == "arrival":
            adapter, duration = arrivals[value]
            chosen = choose(workers, adapter, lead, choices)
            chosen.waiting.append((now, adapter, duration, value >= WARM_UP * requests))
            start(workers.index(chosen), now)
            continue
        if kind == "heartbeat":
            workers[value].reported = frozenset(workers[value].held)
            heapq.heappush(events, (now + HEARTBEAT_S, next(numbers), "heartbeat", value))
            continue
        left -= 1
        workers[value].running -= 1
        start(value, now)
    waits.sort()
    return Outcome(hits / len(waits), sum(waits) / len(waits), waits[int(0.99 * len(waits))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--adapters", type=int, default=200)
    args = parser.parse_args()
    titles = ("power law", "utilization", "reading takes", "lead", "in memory", "mean wait", "p99 wait")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for alpha, utilization, load_s in itertools.product((0.6, 1.2), (0.5, 0.85), (0.1, 0.5)):
        for lead in LEADS:
            made = simulate(lead, utilization, load_s, alpha, args.adapters, args.requests)
            waits = f"{made.mean_wait_s * 1e3:.0f} ms | {made.p99_wait_s * 1e3:.0f} ms"
            print(f"| {alpha} | {utilization} | {load_s} s | {lead:g} | {made.hit_rate:.0%} | {waits} |")


if __name__ == "__main__":
    main()
