"""One model on two machines, with the documented commands: on loopback, and on hosts that are network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fastserve.demo import demo_model_path
from tests.processes import free_ports

START_S = 120.0
NOTICE_S = 5.0
PROMPT = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Machines:
    processes: list[subprocess.Popen[bytes]]
    urls: list[str]
    prefixes: list[list[str]]
    """Command that enters each machine's network."""
    logs: list[Path]

    def get(self, machine: int, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON body; status 0: nobody answers."""
        program = (
            "import sys,urllib.request,urllib.error\n"
            "url, body = sys.argv[1], sys.argv[2].encode() or None\n"
            "request = urllib.request.Request(url, body, {'content-type': 'application/json'})\n"
            "try: answer = urllib.request.urlopen(request, timeout=60)\n"
            "except urllib.error.HTTPError as error: answer = error\n"
            "print(answer.status); print(answer.read().decode())\n"
        )
        text = "" if body is None else json.dumps(body)
        command = [*self.prefixes[machine], sys.executable, "-c", program, self.urls[machine] + path, text]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            return 0, None
        status, _, content = found.stdout.partition("\n")
        return int(status), json.loads(content)

    def wait_status(self, status: int, timeout_s: float) -> float:
        begin = time.monotonic()
        while time.monotonic() - begin < timeout_s:
            assert all(process.poll() is None for process in self.processes), "a machine's process has ended"
            if self.get(0, "/health")[0] == status:
                return time.monotonic() - begin
            time.sleep(0.1)
        raise AssertionError(f"/health was not {status} within {timeout_s} s")

    def answer(self, **fields: str) -> str:
        config = {"top_k": 1, "max_new_tokens": 16} | fields
        status, body = self.get(0, "/", {"prompt": PROMPT, "generate_config": config})
        assert status == 200, body
        return str(body["response"])

    def rank_processes(self) -> list[psutil.Process]:
        """The processes of all ranks, in order."""
        return [rank for machine in range(len(self.processes)) for rank in self._ranks_of(machine)]

    def _ranks_of(self, machine: int) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.processes[machine].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = child.cmdline()
                if "fastserve.engine.process" in command:
                    found.append((0, child))
                elif "fastserve.engine.gang_follower" in command:
                    found.append((int(json.loads(command[-1])["rank"]), child))
        return [child for _, child in sorted(found, key=lambda one: one[0])]


@contextlib.contextmanager
def two_machines(
    folder: Path, ips: Sequence[str], ports: Sequence[int], local_size: int, prefixes: list[list[str]]
) -> Iterator[Machines]:
    """The commands of rtp-llm's documentation, with this module's name."""
    names = [f"llama13B_2A10_PCIE_1_inference_part{part}" for part in range(2)]
    entries = {name: {"name": name, "ip": ip, "port": port} for name, ip, port in zip(names, ips, ports, strict=True)}
    file = folder / "machines.json"
    file.write_text(json.dumps(entries))
    model, size = str(demo_model_path()), str(2 * local_size)
    common = {"DISTRIBUTE_CONFIG_FILE": str(file), "TP_SIZE": size, "WORLD_SIZE": size, "MODEL_TYPE": "llama"}
    common |= {"LOCAL_WORLD_SIZE": str(local_size), "CHECKPOINT_PATH": model, "TOKENIZER_PATH": model}
    common |= {"LORA_INFO": json.dumps({"words": "fastserve-demo-words"})}
    common |= {"FASTSERVE_CLUSTER_KEY": "a-cluster-key-of-this-test-42", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--device", "cpu", "--max-total-tokens", "1024"]
    logs = [folder / f"part{part}.log" for part in range(2)]
    processes = []
    for part, log in enumerate(logs):
        with log.open("wb") as file_of_log:
            processes.append(
                subprocess.Popen(
                    [*prefixes[part], sys.executable, "-m", "fastserve.start_server", *flags],
                    env=os.environ | common | {"START_PORT": str(ports[part]), "WORLD_RANK": str(part * local_size)},
                    stderr=file_of_log,
                )
            )
    urls = [f"http://{ip}:{port}" for ip, port in zip(ips, ports, strict=True)]
    try:
        yield Machines(processes, urls, prefixes, logs)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in logs:
            print(log.read_text())  # shown when the test fails


def loopback_ports() -> list[int]:
    (port,) = free_ports(1)
    return [port, port + 20]


def _load_and_unload_adapters(machines: Machines) -> None:
    """Calls to rank 0 reach the ranks of all machines, and a call that fails leaves nothing on any of them."""
    body = {"lora_name": "mine", "lora_path": "fastserve-demo-words"}
    status, answer = machines.get(0, "/load_lora_adapter", body)
    assert (status, answer["loaded_adapters"]["mine"]) == (200, "fastserve-demo-words")
    assert "twelve" in machines.answer(adapter_name="mine").lower()
    status, answer = machines.get(0, "/load_lora_adapter", {"lora_name": "bad", "lora_path": "/none/such"})
    assert (status, answer["error"]["param"]) == (403, "lora_path")
    assert machines.get(0, "/unload_lora_adapter", {"lora_name": "mine"})[0] == 200
    rows = {row["name"] for row in machines.get(0, "/adapters")[1]["data"]}
    assert rows == {"words"}
    assert "12" in machines.answer()


def test_two_machines_serve_one_model(tmp_path: Path) -> None:
    ports = loopback_ports()
    with two_machines(tmp_path, ["127.0.0.1"] * 2, ports, 1, [[], []]) as machines:
        machines.wait_status(503, START_S)  # rank 0 listens, and waits for the other
        machines.wait_status(200, START_S)
        assert "12" in machines.answer()
        assert "twelve" in machines.answer(adapter_name="words").lower()
        _load_and_unload_adapters(machines)
        assert machines.get(1, "/health")[0] == 200
        for path, body in (("/v1/models", None), ("/", {"prompt": "a"})):
            status, error = machines.get(1, path, body)
            assert status == 421
            assert f"http://127.0.0.1:{ports[0]}" in error["error"]["message"]
        # What launchers wait for.
        assert ["Uvicorn running on" in log.read_text() for log in machines.logs] == [True, False]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("machine", [0, 1])
def test_a_lost_rank_is_noticed_and_the_model_comes_back(tmp_path: Path, machine: int, number: signal.Signals) -> None:
    with two_machines(tmp_path, ["127.0.0.1"] * 2, loopback_ports(), 1, [[], []]) as machines:
        machines.wait_status(200, START_S)
        before, ranks = machines.answer(), machines.rank_processes()
        ranks[machine].send_signal(number)
        machines.wait_status(503, NOTICE_S + 1)
        machines.wait_status(200, START_S)
        assert machines.answer() == before
        assert changed(ranks, machines.rank_processes()) == [machine]


def changed(before: Sequence[psutil.Process], after: Sequence[psutil.Process]) -> list[int]:
    """Ranks that are other processes now."""
    assert len(before) == len(after)
    return [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


PROMPTS = [f"<|im_start|>user\nWhat is {a} + {a + 3}?<|im_end|>\n<|im_start|>assistant\n" for a in range(8)]


def post(url: str, prompt: str) -> tuple[int, str]:
    """Status, and the text or the error's code."""
    body = {"prompt": prompt, "generate_config": {"top_k": 1, "max_new_tokens": 24}}
    response = httpx.post(url, json=body, timeout=60)
    if response.status_code == 200:
        return 200, str(response.json()["response"])
    return response.status_code, str(response.json()["error"]["code"])


def post_until_error(url: str, prompt: str) -> list[tuple[int, str]]:
    found = [post(url, prompt)]
    while found[-1][0] == 200:
        found.append(post(url, prompt))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("local_size", [1, 2])
def test_ranks_of_machines_lost_at_random_moments_come_back_each_time(tmp_path: Path, local_size: int) -> None:
    """Under load: each request ends with its right answer or with the error of a lost engine, and the other ranks keep
    their processes."""
    generator = random.Random(11)
    num_losses = int(os.environ.get("FASTSERVE_RANK_LOSSES", "4"))
    size = 2 * local_size
    with (
        two_machines(tmp_path, ["127.0.0.1"] * 2, loopback_ports(), local_size, [[], []]) as machines,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        url = machines.urls[0]
        machines.wait_status(200, START_S)
        expected = [post(url, prompt) for prompt in PROMPTS]
        assert all(status == 200 for status, _ in expected)
        for number in range(num_losses):
            running = [pool.submit(post_until_error, url, prompt) for prompt in PROMPTS]
            time.sleep(generator.random())
            harm, rank = generator.choice([signal.SIGKILL, signal.SIGSTOP]), generator.randrange(size)
            ranks = machines.rank_processes()
            ranks[rank].send_signal(harm)
            notice_s = machines.wait_status(503, NOTICE_S + 1)
            num_right = 0
            for future, right in zip(running, expected, strict=True):
                *answers, error = future.result()
                assert all(answer == right for answer in answers)
                assert error == (503, "engine_dead")
                num_right += len(answers)
            back_s = machines.wait_status(200, START_S)
            assert list(pool.map(post, [url] * len(PROMPTS), PROMPTS)) == expected
            assert changed(ranks, machines.rank_processes()) == [rank]
            print(
                f"loss {number + 1}: {harm.name} of rank {rank} after {num_right} answers, noticed after "
                f"{notice_s:.1f} s, back after {back_s:.1f} s",
                flush=True,
            )


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a link between them; the commands that enter them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program ip")
    names = [f"fs{os.getpid()}h{part}" for part in range(2)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v0", "netns", names[1])
        for part, name in enumerate(names):
            run("ip", "-n", name, "addr", "add", f"10.231.7.{part + 1}/24", "dev", "v0")
            run("ip", "-n", name, "link", "set", "v0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made: {error.stderr.decode()[:200]}")
    try:
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            run("ip", "netns", "del", name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("local_size", [1, 2])
def test_two_hosts_serve_one_model_and_survive_a_cut_link(
    tmp_path: Path, hosts: list[list[str]], local_size: int
) -> None:
    ips = ["10.231.7.1", "10.231.7.2"]
    with two_machines(tmp_path, ips, [10000, 20000], local_size, hosts) as machines:
        machines.wait_status(200, START_S)
        before, ranks = machines.answer(), machines.rank_processes()
        assert "12" in before
        run("ip", "-n", hosts[1][-1], "link", "set", "v0", "down")
        machines.wait_status(503, NOTICE_S + 1)
        run("ip", "-n", hosts[1][-1], "link", "set", "v0", "up")
        machines.wait_status(200, START_S)
        assert machines.answer() == before
        assert changed(ranks, machines.rank_processes()) == []
