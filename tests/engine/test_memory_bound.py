"""Memory is a hard bound: sizes are found from what limits leave, and an engine at its limits stays within them.

The engines here are real processes under real limits (set right after they are started, seconds before they look for
memory). Each is driven until all blocks of its KV cache are in use and sequences push each other out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import random
import resource
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, PretrainedConfig

from fastserve.engine import build, memory, process, sizing
from fastserve.engine.build import build_core
from fastserve.engine.calls.all_calls import ALL_CALLS
from fastserve.engine.client import EngineProcess, _ending
from fastserve.engine.contract import EngineRequest, Event, Ready, SamplingParams, Submit
from fastserve.engine.devices.cpu import CpuDevice
from fastserve.engine.loading.loader import load_model
from fastserve.engine.memory import FreeMemory, free_host_memory, is_out_of_memory
from fastserve.engine.plan import StepPlan
from fastserve.engine.runner.runner import LaunchedStep, ModelRunner
from fastserve.engine.settings import EngineConfig
from fastserve.errors import StartupError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")

VOCABULARY = 512
CONTEXT = 512
BYTES_PER_TOKEN = 2 * 8 * 2 * 64 * 4
"""Bytes of the KV cache per token: layers x heads x (key and value) x dim x float32."""
MB = 1 << 20


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is quick and has a large KV cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
        initializer_range=0.25,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)


def config(path: str, **settings: Any) -> EngineConfig:
    return EngineConfig(model_dir=path, device="cpu", dtype="float32", **{"max_num_seqs": 32, **settings})


@contextlib.asynccontextmanager
async def started(engine: EngineProcess, limit: Callable[[int], None] = lambda pid: None) -> AsyncIterator[int]:
    """Start the engine, with a limit set on its process before that looks for memory; give its process id."""
    starting = asyncio.create_task(engine.start(lambda _: None))
    try:
        while engine.pid is None and not starting.done():  # noqa: ASYNC110  # the process has no event for its birth
            await asyncio.sleep(0.001)
        assert engine.pid is not None
        limit(engine.pid)
        await starting
        yield engine.pid
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engine.close()


def status(pid: int) -> dict[str, int]:
    """Bytes by name, such as VmHWM (the most that was ever resident) and VmData."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items() if value.endswith("kB")}


@pytest.fixture(scope="module")
def idle(model_path: str) -> dict[str, int]:
    """Memory of an engine with hardly any KV cache; limits are set above it."""

    async def measure() -> dict[str, int]:
        async with started(EngineProcess(config(model_path, max_total_tokens=CONTEXT))) as pid:
            return status(pid)

    return asyncio.run(measure())


def requests() -> list[EngineRequest]:
    """Greedy ones, whose answers are known, between ones that keep the sampler busy."""
    rng = random.Random(4)
    made = []
    for index in range(28):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(150, 380))]
        costly = {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.3}
        sampling: dict[str, Any] = {"temperature": 0.0} if index % 2 else costly
        params = SamplingParams(rng.randint(60, 130), seed=index, logprobs=5 if index % 4 < 2 else None, **sampling)
        made.append(EngineRequest(f"r{index}", prompt, params))
    return made


async def drive(engine: EngineProcess) -> float:
    """Run all requests at once; return the largest share of blocks that was in use. Raises what a request raises."""
    max_used = 0.0

    async def answer(request: EngineRequest) -> list[int]:
        nonlocal max_used
        token_ids: list[int] = []
        with engine.generate(request) as outputs:
            async for output in outputs:
                token_ids += output.token_ids
                max_used = max(max_used, engine.stats.num_used_blocks / engine.stats.num_blocks)
        return token_ids

    todo = requests()
    answers = await asyncio.gather(*map(answer, todo))
    model = AutoModelForCausalLM.from_pretrained(engine._config.model_dir, dtype=torch.float32).eval()
    for request, found in zip(todo, answers, strict=True):
        assert len(found) == request.params.max_tokens
        if request.params.temperature == 0:
            assert_greedy(model, request, found)
    return max_used


def assert_greedy(model: torch.nn.Module, request: EngineRequest, answer: list[int]) -> None:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([request.prompt_ids + answer]), use_cache=False).logits[0]
    rows = logits[len(request.prompt_ids) - 1 : -1]
    sampled = rows.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert (rows.amax(dim=1) - sampled).max() < 1e-2


def capacity(engine: EngineProcess) -> int:
    """Bytes of the KV cache."""
    return engine.stats.num_blocks * 16 * BYTES_PER_TOKEN


async def assert_holds(engine: EngineProcess, pid: int) -> None:
    """At saturation: nobody dies, every answer is right, and all of the cache was used."""
    max_used = await drive(engine)
    assert max_used > 0.95, f"{engine.stats.num_blocks} blocks"
    assert engine.stats.preemptions > 0
    assert engine.stats.num_used_blocks == 0
    assert psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("name", "field", "room"),
    [
        pytest.param("RLIMIT_DATA", "VmData", 150, marks=pytest.mark.slow),
        pytest.param("RLIMIT_AS", "VmSize", 180, marks=pytest.mark.slow),
        pytest.param("RLIMIT_DATA", "VmData", 125, marks=pytest.mark.slow),
        pytest.param("RLIMIT_DATA", "VmData", 180, marks=pytest.mark.slow),
        pytest.param("RLIMIT_AS", "VmSize", 140, marks=pytest.mark.slow),
    ],
)
async def test_limits_of_the_process_hold(
    model_path: str, idle: dict[str, int], name: str, field: str, room: int
) -> None:
    """`room` MB above what an idle engine takes are found, used up, and not exceeded."""
    limit = idle[field] + room * MB
    engine = EngineProcess(config(model_path))
    async with started(engine, lambda pid: prlimit(pid, name, limit)) as pid:
        await assert_holds(engine, pid)
        used = status(pid)
        assert used["VmHWM"] < limit
        assert used[field] < limit
        assert 5 * MB < capacity(engine) < room * MB


def prlimit(pid: int, name: str, limit: int) -> None:
    resource.prlimit(pid, getattr(resource, name), (limit, limit))


async def test_the_limit_of_a_container_holds(model_path: str, idle: dict[str, int]) -> None:
    limit = idle["RssAnon"] + 160 * MB
    engine = EngineProcess(config(model_path))
    with memory_cgroup(limit) as group:
        async with started(engine, lambda pid: enter(group, pid)) as pid:
            await assert_holds(engine, pid)
            assert 5 * MB < capacity(engine) < 160 * MB
            assert (group / "cgroup.procs").read_text().split() == [str(pid)]


def enter(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A group below this process's own, so that its limits hold as well. Skips the test where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), None)
    if own is not None:
        parent, file = Path("/sys/fs/cgroup/memory") / own.lstrip("/"), "memory.limit_in_bytes"
    else:
        own = next((path for _, controllers, path in lines if controllers == ""), "/")
        parent, file = Path("/sys/fs/cgroup") / own.lstrip("/"), "memory.max"
    group = parent / f"fastserve-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (group / file).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"a cgroup's memory cannot be limited here: {error}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("room", "words"),
    [
        (40, r"^Not enough memory: .* MB are free .*\(RLIMIT_DATA\).* lower --max-num-seqs"),
        pytest.param(
            -160,
            r"^Not enough memory to load .*\(RLIMIT_DATA\).*the libraries alone take 268 MB",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["for a cache", "for the libraries"],
)
async def test_too_little_memory_is_a_sentence(
    model_path: str, idle: dict[str, int], room: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It crosses from the engine's process, which then is gone."""
    limit = idle["VmData"] + room * MB
    engine = EngineProcess(config(model_path))
    with pytest.raises(StartupError, match=words):
        async with started(engine, lambda pid: prlimit(pid, "RLIMIT_DATA", limit)):
            pass
    assert engine.pid is not None
    assert not psutil.pid_exists(engine.pid)
    assert "Traceback" not in capfd.readouterr().err


def test_no_memory_in_a_step_ends_the_engine_with_a_reason(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a hang: the process ends with a code that the worker knows, requests fail, and it is started again."""

    def launch(self: ModelRunner, plan: StepPlan) -> LaunchedStep:
        torch.empty(1 << 60)
        raise AssertionError("there was memory")

    core = build_core(config(model_path, max_total_tokens=CONTEXT), lambda *_: None)
    monkeypatch.setattr(ModelRunner, "launch", launch)
    monkeypatch.setattr(build, "build_core", lambda *_: core)
    with zmq.Context() as context, context.socket(zmq.PAIR) as worker, context.socket(zmq.PAIR) as engine:
        worker.bind("inproc://engine")
        engine.connect("inproc://engine")
        worker.send(msgspec.msgpack.encode(Submit(EngineRequest("r", [5, 6], SamplingParams(4)))))
        with pytest.raises(SystemExit) as ended:
            process._serve(config(model_path), engine, ALL_CALLS)
        gc.unfreeze()
        assert msgspec.msgpack.decode(worker.recv(), type=Event) == Ready(core.info)
    assert ended.value.code == memory.OUT_OF_MEMORY_EXIT_CODE
    assert _ending(memory.OUT_OF_MEMORY_EXIT_CODE) == "it ran out of memory in a step"


# ---- sizes ------------------------------------------------------------------------------------------------------


def start_with(path: str, free: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    """Tokens of the KV cache that an engine in this process finds with `free` bytes."""
    monkeypatch.setattr(CpuDevice, "free_memory", lambda self: FreeMemory(free, "in this test"))
    info = build_core(config(path, **settings), lambda *_: None).info
    return info.num_blocks * info.block_size


def test_the_cache_takes_what_the_largest_step_leaves(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # More sequences than the cache holds, so that these do not bound it.
    little, much = (start_with(model_path, size * MB, monkeypatch, max_num_seqs=256) for size in (200, 1000))
    assert much * BYTES_PER_TOKEN == pytest.approx(450 * MB, rel=0.05), "half of 90 %"
    assert little * BYTES_PER_TOKEN < (200 * 0.9 - 96) * MB
    fewer_rows = start_with(model_path, 200 * MB, monkeypatch, max_num_seqs=256, max_num_batched_tokens=16)
    assert fewer_rows > little
    assert start_with(model_path, 10**12, monkeypatch, max_num_seqs=4) == 4 * CONTEXT, "no more than can be used"


def test_a_stated_cache_that_does_not_fit_is_refused(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_with(model_path, 300 * MB, monkeypatch, max_total_tokens=10_000) == 10_000
    with pytest.raises(StartupError, match=r"--max-total-tokens 100000 takes 8\d\d MB .* 315 MB are free in this test"):
        start_with(model_path, 300 * MB, monkeypatch, max_total_tokens=100_000)


@pytest.mark.parametrize("flag", ["block_size", "max_num_seqs", "max_num_batched_tokens"])
def test_sizes_of_nothing_are_refused(model_path: str, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    with pytest.raises(StartupError, match=rf"--{flag.replace('_', '-')} 0 is out of range"):
        start_with(model_path, 300 * MB, monkeypatch, **{flag: 0})


LARGE: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(LlamaConfig(**LARGE), marks=pytest.mark.slow),
        Gemma2Config(**LARGE, head_dim=64, sliding_window=64, final_logit_softcapping=30.0),
        MixtralConfig(**LARGE, num_local_experts=8, num_experts_per_tok=2),
    ],
    ids=["llama", "gemma2", "mixtral"],
)
def test_the_largest_steps_stay_within_what_is_kept_for_them(model: PretrainedConfig, tmp_path: Path) -> None:
    """256 tokens of prompts, and 256 sequences with every costly way of sampling."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model, dtype=torch.float32).save_pretrained(tmp_path)
    settings = config(str(tmp_path), max_num_seqs=256, max_total_tokens=16384)
    loaded = load_model(str(tmp_path), "cpu", "float32", trust_remote_code=False, progress=lambda *_: None)
    kept = sizing.step_bytes(loaded, settings, 256, 512, loaded.device)
    core = build_core(settings, lambda *_: None)
    rng = random.Random(1)
    for index in range(256):
        params = SamplingParams(12, temperature=1.0, top_p=0.9, presence_penalty=0.1, logprobs=20, seed=index)
        core.add(EngineRequest(f"r{index}", [rng.randrange(2, 8000) for _ in range(4)], params))
    memory.return_freed_memory()  # or steps are served from what earlier tests have left
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the most that was ever resident
    except OSError as error:
        pytest.skip(f"the most that is resident cannot be watched here: {error}")
    before = status(os.getpid())["VmRSS"]
    max_rows = 0
    while core.has_work:
        core.step()
        max_rows = max(max_rows, len(core.scheduler.running))
    assert max_rows > 240
    taken = status(os.getpid())["VmHWM"] - before
    assert 0.2 * kept < taken < kept


# ---- what is free -----------------------------------------------------------------------------------------------


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def host(tmp_path: Path, cgroup: str) -> tuple[Path, Path]:
    write(tmp_path / "proc" / "self", cgroup=cgroup)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "proc", tmp_path / "cgroup"


def test_cgroup_v2_and_the_groups_around_it(tmp_path: Path) -> None:
    proc, groups = host(tmp_path, "0::/pod/engine")
    write(groups / "pod" / "engine", memory__max="max", memory__current=700, memory__stat="anon 1")
    write(
        groups / "pod",
        memory__max=1000,
        memory__current=900,
        memory__stat="inactive_file 300\nactive_file 200",
    )
    free = free_host_memory(proc, groups)
    assert free.num_bytes == 1000 - (900 - 500), "pages of files can be given back"
    assert "cgroup" in free.where
    write(groups / "pod" / "engine", memory__high=750)
    assert free_host_memory(proc, groups).num_bytes == 50, "above memory.high it is held up"


def test_cgroup_v1_inside_a_container(tmp_path: Path) -> None:
    """The path is the host's, the mount shows the container's own group at its root."""
    proc, groups = host(tmp_path, "5:cpu,cpuacct:/docker/1\n4:hugetlb,memory:/docker/1\n0::/")
    write(
        groups / "memory",
        memory__limit_in_bytes=5000,
        memory__usage_in_bytes=4000,
        memory__stat="cache 9\ntotal_inactive_file 100\ntotal_active_file 20",
    )
    assert free_host_memory(proc, groups).num_bytes == 1120


def test_without_limits_the_machine_is_the_bound(tmp_path: Path) -> None:
    proc, groups = host(tmp_path, "4:memory:/a")
    write(groups / "memory" / "a", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=4000)
    free = free_host_memory(proc, groups)
    assert free.where == "on this machine"
    assert 0 < free.num_bytes <= psutil.virtual_memory().total


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    proc, groups = host(tmp_path, "0::/")
    write(groups, memory__max=1000, memory__current=1200)
    assert free_host_memory(proc, groups).num_bytes == 0


def test_a_machine_that_does_not_overcommit(tmp_path: Path) -> None:
    proc, groups = host(tmp_path, "0::/")
    write(proc, meminfo="MemTotal: 100 kB\nCommitLimit: 50 kB\nCommitted_AS: 20 kB")
    write(proc / "sys" / "vm", overcommit_memory=2)
    assert free_host_memory(proc, groups) == FreeMemory(30 * 1024, "on this machine, which does not overcommit memory")


def test_what_says_that_there_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 60)
    assert is_out_of_memory(torchs.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    error = StartupError("cannot be loaded")
    error.__cause__ = torchs.value
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(StartupError("not enough memory in a sentence of ours"))
    assert memory.OUT_OF_MEMORY_EXIT_CODE != 1
