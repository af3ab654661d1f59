"""The trace of the benchmark of many adapters, and its figures."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import pytest

from benchmarks.adapter_trace import Served, TraceRequest, TraceSettings, figures, make_trace

SETTINGS = TraceSettings(num_adapters=100, rate=50.0, duration_s=200.0)


def test_equal_settings_make_equal_traces_and_another_seed_another_one() -> None:
    assert make_trace(SETTINGS) == make_trace(SETTINGS)
    assert make_trace(SETTINGS) != make_trace(replace(SETTINGS, seed=43))


def test_the_number_of_adapters_changes_nothing_but_the_adapters() -> None:
    few, many = make_trace(replace(SETTINGS, num_adapters=5)), make_trace(replace(SETTINGS, num_adapters=2000))
    assert [replace(one, adapter=0) for one in few] == [replace(one, adapter=0) for one in many]
    assert {one.adapter for one in few} == set(range(5))
    assert len({one.adapter for one in many}) > 1900


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_coefficient_of_variation(cv: float) -> None:
    trace = make_trace(replace(SETTINGS, cv=cv))
    times = [0.0, *(one.arrival_s for one in trace)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert max(times) < 200
    assert len(trace) == pytest.approx(50 * 200, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize(("alpha", "first_half"), [(1.0, 0.5), (0.3, 0.5**0.3), (3.0, 0.5**3)])
def test_popularity_is_a_power_law(alpha: float, first_half: float) -> None:
    """P(adapter < share of all) = share ^ alpha."""
    trace = make_trace(replace(SETTINGS, alpha=alpha))
    share = sum(one.adapter < 50 for one in trace) / len(trace)
    assert share == pytest.approx(first_half, abs=0.02)
    assert all(0 <= one.adapter < 100 for one in trace)


def test_lengths_are_uniform_between_their_bounds() -> None:
    trace = make_trace(replace(SETTINGS, input_tokens=(8, 512), output_tokens=(3, 5)))
    inputs = [one.num_input_tokens for one in trace]
    assert (min(inputs), max(inputs)) == (8, 512)
    assert statistics.fmean(inputs) == pytest.approx(260, rel=0.02)
    assert {one.num_output_tokens for one in trace} == {3, 4, 5}


def served(arrival_s: float, *token_times_s: float, num_output_tokens: int = 2) -> Served:
    return Served(TraceRequest(arrival_s, 0, 8, num_output_tokens), list(token_times_s))


def test_figures_are_of_the_time_without_its_begin_and_end() -> None:
    """30 s without 6 at each end: from 6 to 24."""
    found = figures(
        [
            served(1.0, 2.0, 7.0),  # arrived before, ended within
            served(10.0, 13.0, 14.0),
            served(20.0, 26.0, 27.0),  # ended after
            served(22.0),  # never had a token
            served(25.0, 25.5, 25.6),  # arrived after
            served(6.0, 7.5, num_output_tokens=9),  # not finished
        ],
        duration_s=30.0,
        cut_s=6.0,
        slo_s=6.0,
    )
    assert found.requests_per_s == pytest.approx(2 / 18)
    assert found.output_tokens_per_s == pytest.approx(4 / 18)
    assert found.latency_mean_s == pytest.approx((6.0 + 4.0) / 2)
    # Times to the first token: 3, 6, none, 1.5.
    assert found.ttft_mean_s == float("inf")
    assert found.ttft_p50_s == 6.0
    assert found.slo_attainment == 3 / 4
    assert found.satisfaction == pytest.approx((0.75 + 0 + 0 + 0.9375) / 4)


def test_a_cut_that_leaves_a_request_less_than_its_time_is_refused() -> None:
    with pytest.raises(ValueError, match="cut_s"):
        figures([], duration_s=30.0, cut_s=5.0, slo_s=6.0)
    with pytest.raises(ValueError, match="cut_s"):
        figures([], duration_s=12.0, cut_s=6.0, slo_s=6.0)
