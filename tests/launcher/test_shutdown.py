"""The shutdown command: ends what launchers started, by their run files, and nothing else."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastserve import supervisor
from fastserve.supervisor import Run, Service

from .launching import Place, is_alive, wait_until


def launched(place: Place, *words: str, mood: str = "", **env: str) -> dict[str, int]:
    result = place.launch("--model-path-address", place.item(place.model(mood=mood)), *words, **env)
    assert result.returncode == 0, result.stderr
    return place.services()


def test_all_in_the_order_that_lets_requests_end(place: Place) -> None:
    pids = launched(place)
    result = place.shutdown()
    assert result.returncode == 0, result.stderr
    told = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("has ended")]
    assert told == ["openai_api_server", "model_worker", "controller"]
    assert not any(is_alive(pid) for pid in pids.values())
    assert not list(place.logs.glob("*.json"))


def test_nothing_running_is_no_error(place: Place) -> None:
    for _ in range(2):
        result = place.shutdown()
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "Nothing to shut down: no service of a launch in logs runs.\n"
        place.logs.mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("kind", "flag"), [("controller", "--serve"), ("model_worker", "--down"), ("openai_api_server", "--serve")]
)
def test_one_kind(place: Place, kind: str, flag: str) -> None:
    pids = launched(place)
    assert place.shutdown(flag, kind).returncode == 0
    assert {name for name, pid in pids.items() if not is_alive(pid)} == {kind}
    assert set(place.services()) == set(pids) - {kind}
    again = place.shutdown(flag, kind)
    assert (again.returncode, again.stdout) == (0, f"Nothing to shut down: no {kind} of a launch in logs runs.\n")


def test_second_launch_beside_the_first(place: Place) -> None:
    first = launched(place)
    beside = Place(place.folder)
    result = beside.launch("--model-path-address", beside.item("model"))
    assert result.returncode == 0, result.stderr
    runs = {run.server_port: run for run in supervisor.read_runs(place.logs)}
    assert set(runs) == {place.server_port, beside.server_port}
    logs = [service.log for run in runs.values() for service in run.services]
    assert len(set(logs)) == 6
    second = {service.kind: service.pid for service in runs[beside.server_port].services}

    assert place.shutdown("--server-port", str(beside.server_port)).returncode == 0
    assert not any(is_alive(pid) for pid in second.values())
    assert all(is_alive(pid) for pid in first.values())
    assert beside.launch("--model-path-address", beside.item("model")).returncode == 0
    assert place.shutdown().returncode == 0
    assert place.strays() == []


def test_stubborn_service_is_killed_with_its_engine_after_the_drain(place: Place) -> None:
    launched(place, mood="engine", STANDIN_MOOD="openai_api_server=stubborn")
    log = place.logs / f"worker_model_127_0_0_1_{place.worker_port}.log"
    found = re.search(r"engine (\d+)", log.read_text())
    assert found is not None
    engine = int(found[1])
    assert is_alive(engine)
    started = time.monotonic()
    result = place.shutdown("--drain-timeout-s", "0.5")
    assert result.returncode == 0, result.stderr
    assert "openai_api_server was killed after 0.5 s" in result.stdout
    assert time.monotonic() - started < 20
    assert not is_alive(engine)
    assert place.strays() == []


def test_engine_of_a_worker_that_died_is_found(place: Place) -> None:
    pids = launched(place, mood="engine")
    psutil.Process(pids["model_worker"]).kill()
    wait_until(lambda: not is_alive(pids["model_worker"]), "the worker's end")
    assert place.strays()
    assert place.shutdown("--serve", "model_worker").returncode == 0
    assert len(place.strays()) == 2


def stranger_run(place: Place, pid: int, started_s: float) -> None:
    place.logs.mkdir()
    service = Service("controller", "controller", pid, started_s, 21001, "controller.log")
    supervisor.write_run(place.logs, Run("0123456789ab", 8888, (service,)))


def test_recycled_process_id_is_left_alone(place: Place) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            stranger_run(place, stranger.pid, psutil.Process(stranger.pid).create_time() - 100)
            result = place.shutdown()
            assert result.returncode == 0, result.stderr
            assert "Nothing to shut down" in result.stdout
            assert stranger.poll() is None
            assert not list(place.logs.glob("*.json"))
        finally:
            stranger.kill()


def test_service_is_known_though_the_clock_was_set(place: Place) -> None:
    pids = launched(place)
    (run,) = supervisor.read_runs(place.logs)
    moved = tuple(dataclasses.replace(service, started_s=service.started_s + 3600) for service in run.services)
    supervisor.write_run(place.logs, dataclasses.replace(run, services=moved))
    assert place.shutdown().returncode == 0
    assert not any(is_alive(pid) for pid in pids.values())


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"run_id": "x", "server_port": 1, "services": [{"a": 1}]})])
def test_unreadable_run_file_is_named(place: Place, content: str) -> None:
    place.logs.mkdir()
    path = Path("logs/fastserve-1-x.pid.json")
    (place.folder / path).write_text(content)
    result = place.shutdown()
    assert result.returncode == 1
    assert result.stderr.startswith(f"{path} is not a run file that can be read")
