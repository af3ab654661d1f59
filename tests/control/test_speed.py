from __future__ import annotations

from collections.abc import Callable

import pytest

from fastserve.control.speed import relative_speeds
from fastserve.protocol import WorkerStatus

MakeStatus = Callable[..., WorkerStatus]


def test_measured_workers_are_compared_with_their_mean(status: MakeStatus) -> None:
    speeds = relative_speeds({"a": status(tokens_per_s=100.0), "b": status(tokens_per_s=300.0)})
    assert speeds == {"a": pytest.approx(0.5), "b": pytest.approx(1.5)}


def test_a_fastchat_worker_counts_as_an_average_one(status: MakeStatus) -> None:
    speeds = relative_speeds({"a": status(tokens_per_s=100.0), "b": status(tokens_per_s=300.0), "f": status()})
    assert speeds["f"] == 1.0


def test_one_kind_alone(status: MakeStatus) -> None:
    assert relative_speeds({"a": status(tokens_per_s=42.0)}) == {"a": 1.0}
    assert relative_speeds({"f": status(), "g": status(speed=2.0)}) == {"f": 1.0, "g": 2.0}
    assert relative_speeds({"a": status(tokens_per_s=0.0)}) == {"a": 1.0}
    assert relative_speeds({}) == {}


def test_workers_of_other_models_do_not_matter(status: MakeStatus) -> None:
    speeds = relative_speeds({"small": status(tokens_per_s=900.0), "big": status(models=("n",), tokens_per_s=9.0)})
    assert speeds == {"small": 1.0, "big": 1.0}


def test_sharing_any_model_keeps_the_proportion(status: MakeStatus) -> None:
    speeds = relative_speeds(
        {
            "a": status(tokens_per_s=100.0),
            "c": status(models=("n",), tokens_per_s=400.0),
            "b": status(models=("m", "n"), tokens_per_s=200.0),
        }
    )
    assert speeds["b"] / speeds["a"] == pytest.approx(2)
    assert speeds["c"] / speeds["b"] == pytest.approx(2)
