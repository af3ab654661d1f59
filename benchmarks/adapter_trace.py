"""Requests for many adapters as S-LoRA's benchmark makes them, and its figures. No server and no clock.

A trace has gamma-distributed times between arrivals (a coefficient of variation of 1: Poisson), adapters of power-law
popularity, and uniform lengths of prompts and answers. Equal settings make equal traces, and the number of adapters
changes nothing but the adapters.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.load import percentile


@dataclass(frozen=True)
class TraceSettings:
    num_adapters: int
    rate: float
    """Requests per second."""
    duration_s: float
    alpha: float = 1.0
    """Popularity of adapters: 1 is uniform, less favours the first, more the last."""
    cv: float = 1.0
    """Coefficient of variation of the time between arrivals."""
    input_tokens: tuple[int, int] = (8, 512)
    """Least and greatest."""
    output_tokens: tuple[int, int] = (8, 512)
    seed: int = 42


@dataclass(frozen=True)
class TraceRequest:
    arrival_s: float
    """Since the begin of the trace."""
    adapter: int
    num_input_tokens: int
    num_output_tokens: int


@dataclass
class Served:
    """A request and what the client saw of its answer, in seconds since the begin of the trace."""

    request: TraceRequest
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.request.arrival_s if self.token_times_s else None

    @property
    def is_finished(self) -> bool:
        return len(self.token_times_s) >= self.request.num_output_tokens


@dataclass(frozen=True)
class Figures:
    requests_per_s: float
    """Finished ones."""
    output_tokens_per_s: float
    ttft_mean_s: float
    """Infinite, as are the next two, if a request of them had no token."""
    ttft_p50_s: float
    ttft_p99_s: float
    latency_mean_s: float
    """TTFT and latency of finished requests."""
    slo_attainment: float
    """Share of requests whose first token came within `slo_s`."""
    satisfaction: float
    """Mean of 1 - (TTFT / slo_s)², 0 for those beyond."""


def make_trace(settings: TraceSettings) -> list[TraceRequest]:
    """In the order of arrival."""
    rng = random.Random(settings.seed)
    shape, scale = settings.cv**-2, settings.cv**2 / settings.rate
    now_s = 0.0
    trace: list[TraceRequest] = []
    while (now_s := now_s + rng.gammavariate(shape, scale)) < settings.duration_s:
        popularity = rng.random() ** (1 / settings.alpha)
        lengths = rng.randint(*settings.input_tokens), rng.randint(*settings.output_tokens)
        trace.append(TraceRequest(now_s, int(popularity * settings.num_adapters), *lengths))
    return trace


def figures(served: Sequence[Served], *, duration_s: float, cut_s: float, slo_s: float) -> Figures:
    """Figures of the time without the first and last `cut_s` seconds: of the tokens and ends within it, and of the
    requests that arrived within it. `cut_s` is `slo_s` at least, so that each of these has had its time.
    """
    begin_s, end_s = cut_s, duration_s - cut_s
    if cut_s < slo_s or end_s <= begin_s:
        raise ValueError(f"cut_s must be at least slo_s and less than half of duration_s; {cut_s=}, {slo_s=}")
    tokens = sum(begin_s <= at <= end_s for item in served for at in item.token_times_s)
    finished = [item for item in served if item.is_finished and begin_s <= item.token_times_s[-1] <= end_s]
    arrived = [item for item in served if begin_s <= item.request.arrival_s <= end_s]
    ttfts = [float("inf") if item.ttft_s is None else item.ttft_s for item in arrived]
    return Figures(
        requests_per_s=len(finished) / (end_s - begin_s),
        output_tokens_per_s=tokens / (end_s - begin_s),
        ttft_mean_s=_mean(ttfts),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        latency_mean_s=_mean([item.token_times_s[-1] - item.request.arrival_s for item in finished]),
        slo_attainment=_mean([float(ttft <= slo_s) for ttft in ttfts]),
        satisfaction=_mean([max(0.0, 1 - (ttft / slo_s) ** 2) for ttft in ttfts]),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
