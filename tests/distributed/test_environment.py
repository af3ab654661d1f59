"""Environments in rtp-llm's variables: what they mean, and how all that is wrong is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import WorkerConfig
from fastserve.distributed.environment import read_environment
from fastserve.distributed.gang import own_ip
from fastserve.distributed.problems import EnvironmentFault
from fastserve.distributed.shared_memory import small_shared_memory
from fastserve.errors import StartupError
from fastserve.options import parse_config
from fastserve.start_server import find_gang, worker_arguments
from fastserve.worker.adapter_source import find_adapters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def machines_file(folder: Path, entries: Any) -> str:
    path = folder / "machines.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def machine(name: str, ip: str = "10.0.0.1", port: Any = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "ip": ip}
    return entry if port is None else entry | {"port": port}


def two_machines(folder: Path, **changes: Any) -> str:
    entries = {"m_part0": machine("m_part0", "10.0.0.1", 10000), "m_part1": machine("m_part1", "10.0.0.2", 20000)}
    return machines_file(folder, entries | changes)


def problems_of(environ: Mapping[str, str]) -> str:
    with pytest.raises(EnvironmentFault) as caught:
        read_environment(environ)
    assert caught.value.exit_code == 2
    return caught.value.message


def test_the_documented_command_for_one_machine(model: Path) -> None:
    found = read_environment(
        {"TP_SIZE": "2", "WORLD_SIZE": "2", "MODEL_TYPE": "llama", "CHECKPOINT_PATH": str(model)}
        | {"TOKENIZER_PATH": str(model)}
    )
    world = found.world
    assert (world.size, world.local_size, world.first_rank, world.port, world.machines) == (2, 2, 0, 8088, ())
    assert (found.checkpoint, found.tokenizer) == (model, None)


@pytest.mark.parametrize(("rank", "port"), [(0, 10000), (2, 20000)])
def test_the_documented_commands_for_two_machines(model: Path, rank: int, port: int) -> None:
    world = read_environment(
        {"START_PORT": str(port), "DISTRIBUTE_CONFIG_FILE": two_machines(model), "WORLD_RANK": str(rank)}
        | {"TP_SIZE": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "CHECKPOINT_PATH": str(model)}
    ).world
    assert (world.size, world.local_size, world.first_rank, world.port) == (4, 2, rank, port)
    assert [(item.part, item.ip, item.port) for item in world.machines] == [
        (0, "10.0.0.1", 10000),
        (1, "10.0.0.2", 20000),
    ]


def test_parts_are_numbers_and_a_missing_port_is_that_of_part_0(model: Path) -> None:
    entries = {f"m_part{at}": machine(f"m_part{at}", f"10.0.0.{at + 1}") for at in reversed(range(12))}
    entries["m_part0"]["port"] = 9000
    environ = {"WORLD_SIZE": "12", "TP_SIZE": "12", "CHECKPOINT_PATH": str(model)}
    world = read_environment(environ | {"DISTRIBUTE_CONFIG_FILE": machines_file(model, entries)}).world
    assert [item.part for item in world.machines] == list(range(12))
    assert {item.port for item in world.machines} == {9000}


def test_the_file_of_machines_may_come_late(model: Path) -> None:
    environ = {"WORLD_SIZE": "2", "TP_SIZE": "2", "CHECKPOINT_PATH": str(model)}
    assert read_environment(environ | {"DISTRIBUTE_CONFIG_FILE": str(model / "later.json")}).world.machines == ()


BAD = {
    "a size that is no number": ({"TP_SIZE": "two"}, ["TP_SIZE=two", "1 to"]),
    "a size with a point": ({"WORLD_SIZE": "2.0"}, ["WORLD_SIZE=2.0"]),
    "a size in other digits": ({"WORLD_SIZE": "٢"}, ["WORLD_SIZE"]),
    "a size of 0": ({"TP_SIZE": "0"}, ["TP_SIZE=0"]),
    "a negative rank": ({"WORLD_RANK": "-1"}, ["WORLD_RANK=-1"]),
    "a size that is huge": ({"WORLD_SIZE": "9" * 400}, ["WORLD_SIZE=999", "…"]),
    "a port out of range": ({"START_PORT": "70000"}, ["START_PORT=70000", "65535"]),
    "sizes that differ": ({"TP_SIZE": "2", "WORLD_SIZE": "3"}, ["TP_SIZE=2", "WORLD_SIZE=3", "TP_SIZE=3"]),
    "a world size alone": ({"WORLD_SIZE": "4"}, ["TP_SIZE=1", "TP_SIZE=4"]),
    "pipeline parallelism": ({"PP_SIZE": "2", "WORLD_SIZE": "2"}, ["PP_SIZE=2"]),
    "data parallelism": ({"DP_SIZE": "2"}, ["DP_SIZE=2"]),
    "fewer ranks with experts than ranks": (
        {"TP_SIZE": "4", "WORLD_SIZE": "4", "EP_SIZE": "2"},
        ["EP_SIZE=2", "TP_SIZE=4", "Set EP_SIZE=4, or leave it out"],
    ),
    "experts without ranks": ({"EP_SIZE": "2"}, ["EP_SIZE=2 and TP_SIZE=1", "Set EP_SIZE=1"]),
    "experts in a size that is no number": ({"EP_SIZE": "all"}, ["EP_SIZE=all"]),
    "a rank beyond the world": ({"TP_SIZE": "2", "WORLD_SIZE": "2", "WORLD_RANK": "2"}, ["WORLD_RANK=2"]),
    "more local ranks than ranks": ({"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE=2", "WORLD_SIZE=1"]),
    "local ranks that do not divide": (
        {"TP_SIZE": "3", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
        ["WORLD_SIZE=3", "LOCAL_WORLD_SIZE=2"],
    ),
    "several machines without their file": (
        {"TP_SIZE": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        ["DISTRIBUTE_CONFIG_FILE"],
    ),
    "a rank within a machine": (
        {"TP_SIZE": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "WORLD_RANK": "1"},
        ["WORLD_RANK=1", "Give 0 or 2"],
    ),
    "no checkpoint": ({"CHECKPOINT_PATH": ""}, ["CHECKPOINT_PATH is not set"]),
    "a checkpoint that is not there": ({"CHECKPOINT_PATH": "/nowhere"}, ["CHECKPOINT_PATH=/nowhere"]),
    "a tokenizer that is not there": ({"TOKENIZER_PATH": "/nowhere"}, ["TOKENIZER_PATH=/nowhere"]),
    "an unknown type of weights": ({"WEIGHT_TYPE": "FP12"}, ["WEIGHT_TYPE=FP12", "INT8"]),
    "a length of 1": ({"MAX_SEQ_LEN": "1"}, ["MAX_SEQ_LEN=1"]),
    "no concurrency": ({"CONCURRENCY_LIMIT": "0"}, ["CONCURRENCY_LIMIT=0"]),
    "reuse that is neither on nor off": ({"REUSE_CACHE": "yes"}, ["REUSE_CACHE=yes"]),
    "fewer devices than ranks": (
        {"TP_SIZE": "2", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0"},
        ["CUDA_VISIBLE_DEVICES=0", "1 devices for 2 ranks"],
    ),
    "a device twice": ({"CUDA_VISIBLE_DEVICES": "0,0"}, ["twice"]),
    "adapters that are no JSON": ({"LORA_INFO": "a=b"}, ["LORA_INFO=a=b"]),
    "an adapter without a path": ({"LORA_INFO": '{"a": 1}'}, ["LORA_INFO", "names and folders"]),
    "a control character": ({"TP_SIZE": "1\x1b[31m\n2"}, ["TP_SIZE=1\\x1b"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_environment_is_refused_with_names_and_remedy(model: Path, case: str) -> None:
    environ, expected = BAD[case]
    message = problems_of({"CHECKPOINT_PATH": str(model)} | environ)
    for part in expected:
        assert part in message
    assert len(message) < 1500


TWO = {"TP_SIZE": "2", "WORLD_SIZE": "2"}
BAD_MACHINES: dict[str, tuple[Any, list[str]]] = {
    "no JSON": ("{", ["is no JSON"]),
    "a list": ([], ["JSON object"]),
    "nothing": ({}, ["JSON object"]),
    "too deep": ("[" * 100_000, ["is no JSON"]),
    "no part": ({"a": machine("a"), "a_part1": machine("a_part1")}, ["machine a", "_part0"]),
    "a name that is not the key": ({"a_part0": machine("b"), "a_part1": machine("a_part1", "10.0.0.2")}, ['is "b"']),
    "no name": ({"a_part0": {"ip": "10.0.0.1"}, "a_part1": machine("a_part1", "10.0.0.2")}, ["is missing"]),
    "no ip": ({"a_part0": {"name": "a_part0"}, "a_part1": machine("a_part1")}, ['"ip"']),
    "an ip out of range": (
        {"a_part0": machine("a_part0", "10.0.0.256"), "a_part1": machine("a_part1")},
        ["10.0.0.256"],
    ),
    "a URL for an ip": ({"a_part0": machine("a_part0", "http://a"), "a_part1": machine("a_part1")}, ["http://a"]),
    "a host name of a kilobyte": (
        {"a_part0": machine("a_part0", ".".join(["abc"] * 256)), "a_part1": machine("a_part1")},
        ["host name"],
    ),
    "a number for an ip": ({"a_part0": machine("a_part0", 5), "a_part1": machine("a_part1")}, ["is 5"]),  # type: ignore[arg-type]
    "a port as text": ({"a_part0": machine("a_part0", port="80"), "a_part1": machine("a_part1")}, ['"port"', '"80"']),
    "a port of true": ({"a_part0": machine("a_part0", port=True), "a_part1": machine("a_part1")}, ["is true"]),
    "a machine that is no object": ({"a_part0": 5, "a_part1": machine("a_part1")}, ["an object"]),
    "a part twice": ({"a_part0": machine("a_part0"), "b_part0": machine("b_part0", "10.0.0.2")}, ["2 machines are"]),
    "a gap": ({"a_part0": machine("a_part0"), "a_part2": machine("a_part2", "10.0.0.2")}, ["_part1"]),
    "no part 0": ({"a_part1": machine("a_part1"), "a_part2": machine("a_part2", "10.0.0.2")}, ["_part0"]),
    "an address twice": (
        {"a_part0": machine("a_part0", port=80), "a_part1": machine("a_part1")},
        ["a_part0, a_part1", "10.0.0.1:80"],
    ),
    "too many machines": ({f"a_part{at}": machine(f"a_part{at}", f"10.0.0.{at}") for at in range(3)}, ["3 machines"]),
    "an ip that nobody reaches": (
        {"a_part0": machine("a_part0", "0.0.0.0"), "a_part1": machine("a_part1", "10.0.0.2")},
        ["0.0.0.0"],
    ),
}


@pytest.mark.parametrize("case", BAD_MACHINES)
def test_a_bad_file_of_machines_is_refused_with_names_and_remedy(model: Path, case: str) -> None:
    entries, expected = BAD_MACHINES[case]
    environ = TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": machines_file(model, entries)}
    message = problems_of(environ)
    for part in expected:
        assert part in message


def test_machines_may_have_host_names(model: Path) -> None:
    names = ["ranks-0.ranks.fastserve.svc", "Host-1"]
    file = machines_file(model, {f"m_part{at}": machine(f"m_part{at}", name) for at, name in enumerate(names)})
    world = read_environment(TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": file}).world
    assert [item.ip for item in world.machines] == names


def test_a_file_without_end_is_not_read_whole(model: Path) -> None:
    message = problems_of(TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": "/dev/zero"})
    assert "JSON object" in message


def test_all_problems_are_reported_together(model: Path) -> None:
    message = problems_of({"TP_SIZE": "2", "WORLD_SIZE": "3", "WORLD_RANK": "x", "START_PORT": "0"})
    lines = message.split("\n")
    assert lines[0].startswith("4 problems")
    for name in ("TP_SIZE=2", "WORLD_RANK=x", "START_PORT=0", "CHECKPOINT_PATH"):
        assert sum(name in line for line in lines) == 1, "each problem once, and none that only follows from another"


def test_the_process_ends_with_2_before_torch_is_imported(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")}
    code = (
        "import sys\n"
        "from fastserve import start_server\n"
        "try:\n    start_server.main([])\n"
        "except SystemExit as error:\n"
        "    print(error.code, sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"TP_SIZE": "2", "WORLD_SIZE": "5", "CHECKPOINT_PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split("\n")[0] == "2 []"
    assert "TP_SIZE=2" in done.stderr
    assert "CHECKPOINT_PATH=/nowhere" in done.stderr


def test_the_environment_becomes_flags_of_the_worker(model: Path, tmp_path: Path) -> None:
    environ = {"CHECKPOINT_PATH": str(model), "TOKENIZER_PATH": str(tmp_path), "START_PORT": "9000"}
    environ |= {"MAX_SEQ_LEN": "512", "CONCURRENCY_LIMIT": "7", "WEIGHT_TYPE": "int8", "REUSE_CACHE": "0"}
    arguments = worker_arguments(environ, ["--seed", "5"])
    text = " ".join(arguments)
    for part in (
        f"--model-path {model}",
        "--host :: --port 9000",
        f"--tokenizer-path {tmp_path}",
        "--max-model-len 512",
        "--limit-worker-concurrency 7",
        "--load-8bit",
        "--no-prefix-cache",
        "--no-register",
    ):
        assert part in text
    assert arguments[-2:] == ["--seed", "5"]
    assert "--tp-size" not in text
    assert "--tp-size 2" in " ".join(worker_arguments(TWO | {"CHECKPOINT_PATH": str(model)}, []))


@pytest.mark.parametrize(("ep_size", "is_given"), [("2", True), ("1", False), ("0", False)])
def test_experts_are_given_out_to_all_ranks_or_none(model: Path, ep_size: str, is_given: bool) -> None:
    arguments = worker_arguments(TWO | {"CHECKPOINT_PATH": str(model), "EP_SIZE": ep_size}, [])
    assert ("--enable-expert-parallel" in arguments) == is_given
    assert parse_config(WorkerConfig, arguments, "x", {}).enable_expert_parallel == is_given


@pytest.mark.parametrize(
    ("environ", "flags"),
    [({"FASTSERVE_CONTROLLER_ADDRESS": "http://c:21001"}, []), ({}, ["--controller-address", "http://c:21001"])],
)
def test_with_the_address_of_a_controller_it_registers(model: Path, environ: dict[str, str], flags: list[str]) -> None:
    arguments = worker_arguments({"CHECKPOINT_PATH": str(model)} | environ, flags)
    assert "--no-register" not in arguments
    assert arguments[arguments.index("--controller-address") + 1] == "http://c:21001"


TWO_BY_TWO = {"TP_SIZE": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_each_machine_finds_itself_among_all(model: Path) -> None:
    environ = TWO_BY_TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": two_machines(model)}
    gang = find_gang(environ | {"WORLD_RANK": "2", "START_PORT": "20000", "GANG_TIMEOUT_MIN": "2"})
    assert gang is not None
    assert (gang.part, list(gang.local_ranks), gang.size, gang.timeout_s) == (1, [2, 3], 4, 120.0)
    assert gang.service_url == "http://10.0.0.1:10000"
    assert gang.control_endpoint() == "tcp://10.0.0.1:10001"
    assert [gang.relay_port(part) for part in range(2)] == [10002, 20002]
    assert find_gang({"TP_SIZE": "2", "WORLD_SIZE": "2", "CHECKPOINT_PATH": str(model)}) is None


def test_a_file_of_machines_may_come_late_and_be_written_slowly(model: Path) -> None:
    whole = Path(two_machines(model)).read_text()
    late = model / "late.json"
    environ = TWO_BY_TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": str(late), "START_PORT": "10000"}

    def write() -> None:
        late.write_text(whole[:40])
        time.sleep(0.2)
        late.write_text(whole)

    writer = threading.Timer(0.2, write)
    writer.start()
    gang = find_gang(environ, poll_s=0.02)
    writer.join()
    assert gang is not None
    assert len(gang.machines) == 2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"START_PORT": "10001"}, ["START_PORT=10001", "10000", "_part0"]),
        ({"GANG_TIMEOUT_MIN": "0"}, ["GANG_TIMEOUT_MIN=0"]),
    ],
)
def test_a_machine_that_is_not_where_the_file_says_is_refused(
    model: Path, changes: dict[str, str], parts: list[str]
) -> None:
    environ = TWO_BY_TWO | {"CHECKPOINT_PATH": str(model), "DISTRIBUTE_CONFIG_FILE": two_machines(model)}
    with pytest.raises(EnvironmentFault) as caught:
        find_gang(environ | {"START_PORT": "10000"} | changes)
    for part in parts:
        assert part in caught.value.message


def test_machines_on_one_address_need_ports_that_are_apart(model: Path) -> None:
    entries = {f"m_part{at}": machine(f"m_part{at}", port=10000 + 2 * at) for at in range(2)}
    environ = TWO_BY_TWO | {"CHECKPOINT_PATH": str(model), "START_PORT": "10000"}
    with pytest.raises(EnvironmentFault, match="at least 3 apart"):
        find_gang(environ | {"DISTRIBUTE_CONFIG_FILE": machines_file(model, entries)})


def test_the_own_address_is_that_of_the_route_to_the_others() -> None:
    assert own_ip("127.0.0.1") == "127.0.0.1"
    assert own_ip("127.0.0.9") == "127.0.0.1"
    assert own_ip("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(StartupError, match=r"no route to nowhere\.invalid"):
        own_ip("nowhere.invalid")


def test_small_shared_memory_is_a_warning_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = os.statvfs_result((4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255))  # 64 MiB, docker's default
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    warning = small_shared_memory(2, str(tmp_path))
    assert warning is not None
    for part in ("64 MiB", "--shm-size=2g", "emptyDir", "sizeLimit: 2Gi"):
        assert part in warning
    assert small_shared_memory(1, str(tmp_path)) is None
    assert small_shared_memory(2, str(tmp_path / "missing")) is None


def test_adapters_of_the_environment_reach_the_worker(model: Path) -> None:
    environ = {"CHECKPOINT_PATH": str(model), "LORA_INFO": '{"words": "fastserve-demo-words"}'}
    config = parse_config(WorkerConfig, worker_arguments(environ, []), "worker", environ)
    assert [adapter.name for adapter in find_adapters(config, ("base",))] == ["words"]
