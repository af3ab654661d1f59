"""Files and batches: by OpenAI's client through the API server, and what happens when processes die."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import openai
import pytest
from aiohttp import web

from fastserve.errors import OverloadedError, ServiceError
from fastserve.gateway.batches.lines import InputReader, OutputFile, check_input
from fastserve.gateway.batches.runner import BatchRunner
from fastserve.gateway.batches.spare import SpareCapacity
from fastserve.gateway.batches.store import SILENCE_S, BatchBounds, BatchStore
from fastserve.openai.batches import Batch, File
from tests.gateway.cluster import ANSWER, MODEL, Cluster, answer_well, respond, start_cluster, until

CHAT_PATH: Final = "/v1/chat/completions"
BOUNDS = BatchBounds(max_files=100, max_file_bytes=2**20, max_batches=10, max_requests=50)


def line(custom_id: str, **changes: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": custom_id}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT_PATH, "body": body} | changes)


def lines(*ids: str) -> bytes:
    return "\n".join(map(line, ids)).encode()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with start_cluster(batches_folder=str(tmp_path / "batches")) as made:
        yield made


def sdk(cluster: Cluster, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key=key, max_retries=0)


async def start_batch(client: openai.AsyncOpenAI, content: bytes, **more: Any) -> str:
    file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id, endpoint=CHAT_PATH, completion_window="24h", extra_body=more
    )
    assert made.status == "validating"
    return made.id


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(20):
        while (batch := await client.batches.retrieve(batch_id)).status not in (  # noqa: ASYNC110
            *("completed", "failed", "cancelled", "expired"),
        ):
            await asyncio.sleep(0.05)
    return batch


async def content(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await client.files.content(file_id)).text
    made = [json.loads(each) for each in text.splitlines()]
    return {each["custom_id"]: each for each in made}


async def test_a_batch_is_answered_through_openais_client(cluster: Cluster) -> None:
    async def script(request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        if asked["messages"][0]["content"] == "bad":
            return web.json_response({"error": {"message": "no", "type": "invalid_request_error"}}, status=400)
        return await answer_well(request)

    worker = await cluster.worker(script)
    async with sdk(cluster) as client:
        batch = await ended(client, await start_batch(client, lines("a", "bad", "b"), metadata={"job": "7"}))
        assert (batch.status, batch.model, batch.metadata) == ("completed", MODEL, {"job": "7"})
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
        answers = await content(client, batch.output_file_id)
        assert set(answers) == {"a", "b"}
        assert answers["a"]["response"]["status_code"] == 200
        assert answers["a"]["response"]["body"] == ANSWER
        errors = await content(client, batch.error_file_id)
        assert errors["bad"]["response"]["status_code"] == 400
        assert errors["bad"]["response"]["body"]["error"]["message"] == "no"
        # Behind whoever waits for an answer.
        assert {json.loads(body)["priority"] for path, _, body in worker.requests if path == CHAT_PATH} == {100}
        assert [each.id async for each in client.batches.list()] == [batch.id]
        kept = [each.purpose async for each in client.files.list()]
        assert sorted(kept) == ["batch", "batch_output", "batch_output"]


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        (b"", "empty_file", None),
        (line("a").encode() + b"\n{", "invalid_json_line", 2),
        (b'{"custom_id": "a"}', "invalid_json_line", 1),
        (b"\xff\xfe", "invalid_json_line", 1),
        (b"[" * 100_000, "invalid_json_line", 1),
        (lines("a", "a"), "duplicate_custom_id", 2),
        (line("a", method="GET").encode(), "invalid_method", 1),
        (line("a", url="/v1/completions").encode(), "mismatched_endpoint", 1),
        (line("a", body={"model": 7}).encode(), "invalid_body", 1),
        (line("a", body={"model": MODEL, "stream": True}).encode(), "invalid_body", 1),
        (line("").encode(), "invalid_custom_id", 1),
        (lines(*map(str, range(60))), "too_many_requests", 51),
    ],
)
def test_a_wrong_input_file_is_refused_before_anything_runs(
    tmp_path: Path, content: bytes, code: str, at: int | None
) -> None:
    path = tmp_path / "input"
    path.write_bytes(content)
    found = check_input(path, CHAT_PATH, BOUNDS.max_requests)
    assert [(error.code, error.line) for error in found.errors] == [(code, at)]


async def test_errors_of_the_input_are_in_the_failed_batch(cluster: Cluster) -> None:
    worker = await cluster.worker(answer_well)
    async with sdk(cluster) as client:
        batch = await ended(client, await start_batch(client, lines("a") + b"\nnonsense"))
        assert batch.status == "failed"
        assert [(error.code, error.line) for error in batch.errors.data] == [("invalid_json_line", 2)]
    assert not [path for path, _, _ in worker.requests if path == CHAT_PATH]


async def test_wrong_requests_are_refused_by_field(cluster: Cluster) -> None:
    async with sdk(cluster) as client:
        with pytest.raises(openai.BadRequestError, match="'purpose'"):
            await client.files.create(file=("x", b"x"), purpose="nonsense")  # type: ignore[arg-type]
        with pytest.raises(openai.NotFoundError, match="No such file"):
            await client.batches.create(input_file_id="file-1", endpoint=CHAT_PATH, completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            await client.files.content("../../etc/passwd")
        file = await client.files.create(file=("x", lines("a")), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.batches.create(input_file_id=file.id, endpoint=CHAT_PATH, completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="'endpoint'"):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/nothing", completion_window="24h")  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="completion_window"):
            await client.batches.create(input_file_id=file.id, endpoint=CHAT_PATH, completion_window="1 week")  # type: ignore[arg-type]
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)


async def test_a_key_sees_only_what_is_its_own(tmp_path: Path) -> None:
    async with start_cluster(api_keys=("one", "two"), batches_folder=str(tmp_path)) as cluster:
        await cluster.worker(answer_well)
        async with sdk(cluster, "one") as one, sdk(cluster, "two") as two:
            batch = await ended(one, await start_batch(one, lines("a")))
            for call in (
                *(two.batches.retrieve, two.batches.cancel),
                *(lambda _: two.files.retrieve(batch.output_file_id), lambda _: two.files.delete(batch.input_file_id)),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call(batch.id)
            assert [each async for each in two.files.list()] == []


async def test_lists_have_as_many_entries_as_asked_for(cluster: Cluster) -> None:
    async with sdk(cluster) as client:
        made = [await client.files.create(file=b"{}", purpose="user_data") for _ in range(3)]
        page = await client.files.list(limit=2, order="asc")
        assert [file.id for file in page.data] == [file.id for file in made[:2]]
        assert page.has_more
    for query, param in (
        ("limit=0", "limit"),
        ("limit=two", "limit"),
        ("order=up", "order"),
        ("after=" + "x" * 200, "after"),
    ):
        for path in ("/v1/files", "/v1/batches"):
            async with cluster.http.get(f"{cluster.url}{path}?{query}") as response:
                assert (response.status, (await response.json())["error"]["param"]) == (400, param)


async def test_a_cancelled_batch_keeps_the_answers_that_it_has(cluster: Cluster) -> None:
    hold = asyncio.Event()

    async def script(request: web.Request) -> web.StreamResponse:
        if json.loads(await request.read())["messages"][0]["content"] != "a":
            await hold.wait()
        return await answer_well(request)

    worker = await cluster.worker(script)
    async with sdk(cluster) as client:
        batch_id = await start_batch(client, lines("a", "b", "c"))
        await until(lambda: worker.running == 2, 10)
        batch = await client.batches.retrieve(batch_id)
        with pytest.raises(openai.ConflictError, match="Cancel it first"):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch_id)).status == "cancelling"
        batch = await ended(client, batch_id)
        assert batch.status == "cancelled"
        assert set(await content(client, batch.output_file_id)) == {"a"}
        await until(lambda: worker.running == 0)  # what ran was aborted
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch_id)


async def test_requests_wait_until_a_worker_can_take_them(cluster: Cluster) -> None:
    refusals = iter([429, 503, 503])

    async def script(request: web.Request) -> web.StreamResponse:
        status = next(refusals, 200)
        return await (answer_well if status == 200 else respond(status, {"error": {"message": "full"}}))(request)

    await cluster.worker(script)
    async with sdk(cluster) as client:
        batch = await ended(client, await start_batch(client, lines("a")))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 0)


# ---- processes that die -----------------------------------------------------------------------------------------


async def make_store(folder: Path, content: bytes, clock: Callable[[], float], window_s: int = 100) -> BatchStore:
    store = BatchStore(folder, BOUNDS, clock)
    file_id, path = await store.new_content()
    path.write_bytes(content)
    now = int(clock())
    await store.add_file("", File(file_id, len(content), now, "in", "batch"))
    await store.add_batch("", Batch("batch_1", CHAT_PATH, file_id, "24h", now, now + window_s))
    return store


async def test_files_that_are_kept_bound_batches_too(tmp_path: Path) -> None:
    """One input could be run again and again, with new answers each time."""
    bounds = BatchBounds(max_files=1, max_file_bytes=2**20, max_batches=10, max_requests=50)
    store = BatchStore(tmp_path, bounds, lambda: 1000.0)
    file = File("file-1", 1, 1000, "in", "batch")
    await store.add_file("", file)
    with pytest.raises(OverloadedError, match="--max-batch-files"):
        await store.add_batch("", Batch("batch_1", CHAT_PATH, file.id, "24h", 1000, 2000))
    store.close()


async def test_the_oldest_ended_batches_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastserve.gateway.batches.store.MAX_ENDED", 2)
    store = BatchStore(tmp_path, BOUNDS, lambda: 1000.0)
    for number in range(5):
        status: Any = "validating" if number == 0 else "completed"
        await store.add_batch("", Batch(f"batch_{number}", CHAT_PATH, "f", "24h", 1000, 2000, status))
    await store.add_batch("", Batch("batch_5", CHAT_PATH, "f", "24h", 1000, 2000))
    kept, _ = await store.batches("", after=None, limit=10, descending=False)
    assert [batch.id for batch in kept] == ["batch_0", "batch_3", "batch_4", "batch_5"]
    store.close()


def runner_of(store: BatchStore, send: Any) -> BatchRunner:
    async def model_of(path: str, body: bytes) -> str:
        return MODEL

    return BatchRunner(store, send, model_of, SpareCapacity(lambda _: (1, 0), max_idle=4))


async def test_a_batch_goes_on_where_its_process_died(tmp_path: Path) -> None:
    now = 1000.0
    store = await make_store(tmp_path, lines(*"abcdefgh"), lambda: now)
    asked: list[str] = []

    def sender(num_answers: int) -> Any:
        async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
            if num_answers <= len(asked):
                await asyncio.sleep(60)
            asked.append(json.loads(body)["messages"][0]["content"])
            return 200, b'{"choices": []}'

        return send

    first = asyncio.create_task(run(runner_of(store, sender(3))))
    await until(lambda: len(asked) == 3)
    output = tmp_path / "files" / "file-1-output"
    await until(lambda: output.exists() and output.read_bytes().count(b"\n") == 3)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    with output.open("ab") as file:
        file.write(b'{"custom_id": "d", "cut')  # as after a power failure
    now += SILENCE_S + 1
    second = asyncio.create_task(run(runner_of(store, sender(100))))
    await until_ended(store)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert sorted(asked) == list("abcdefgh"), "each was asked once"
    batch = await store.batch("", "batch_1")
    assert (batch.status, batch.request_counts.completed) == ("completed", 8)
    assert batch.output_file_id is not None
    written = [json.loads(each) for each in store.path_of(batch.output_file_id).read_text().splitlines()]
    assert sorted(each["custom_id"] for each in written) == list("abcdefgh")
    store.close()


async def test_what_has_no_answer_in_time_expires(tmp_path: Path) -> None:
    store = await make_store(tmp_path, lines("a", "b"), lambda: 1000.0, window_s=1)

    async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        if b'"a"' not in body:
            await asyncio.sleep(60)
        return 200, b"{}"

    task = asyncio.create_task(run(runner_of(store, send)))
    await until_ended(store)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    batch = await store.batch("", "batch_1")
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("expired", 1, 1)
    assert batch.error_file_id is not None
    expired = json.loads(store.path_of(batch.error_file_id).read_text())
    assert (expired["custom_id"], expired["error"]["code"]) == ("b", "batch_expired")
    store.close()


async def run(runner: BatchRunner) -> None:
    async with runner.running():
        await asyncio.Event().wait()


async def until_ended(store: BatchStore) -> None:
    async with asyncio.timeout(10):
        while (await store.batch("", "batch_1")).status not in ("completed", "expired"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_two_processes_never_run_one_batch(tmp_path: Path) -> None:
    store = await make_store(tmp_path, lines("a"), lambda: 1000.0)
    other = BatchStore(tmp_path, BOUNDS, lambda: 1000.0)
    assert await store.claim("first") is not None
    assert await other.claim("second") is None
    _, batch = await store.claim("first") or ("", await store.batch("", "batch_1"))
    assert not await other.update("second", batch)
    store.close()
    other.close()


async def test_one_request_a_worker_runs_beside_those_of_clients_and_more_when_it_is_quiet() -> None:
    in_flight, most, running, now = 0, 0, 0, 100.0
    spare = SpareCapacity(lambda _: (2, in_flight), max_idle=3, clock=lambda: now)

    async def use() -> None:
        nonlocal running, most, in_flight
        async with spare.use(MODEL):
            running += 1
            in_flight += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            in_flight -= 1

    async def most_at_once(others: int, quiet_s: float) -> int:
        """Others ask, and are quiet after it for so long while requests of a batch wait."""
        nonlocal in_flight, most, now
        async with spare.use(MODEL):
            in_flight, most = 1 + others, 0
            waiting = [asyncio.create_task(use()) for _ in range(12)]
            await asyncio.sleep(0.01)
            in_flight -= others
            now += quiet_s
            await asyncio.sleep(0.01)
        in_flight -= 1
        await asyncio.gather(*waiting)
        return most

    assert await most_at_once(others=5, quiet_s=0.0) == 2
    assert await most_at_once(others=0, quiet_s=1.0) == 4
    assert await most_at_once(others=0, quiet_s=60.0) == 6


def test_lines_that_were_not_written_to_their_end_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"custom_id":"a"}\n{"custom_id":"b"')
    assert OutputFile(path).recover() == {"a"}
    assert path.read_bytes() == b'{"custom_id":"a"}\n'
    path.write_bytes(lines("a", "b", "c"))
    reader = InputReader(path, frozenset({"b"}))
    assert [each.custom_id for each in reader.read()] == ["a", "c"]
    assert reader.read() == []


# ---- disks and processes that fail in the middle ----------------------------------------------------------------


def custom_ids(store: BatchStore, file_id: str | None) -> list[str]:
    assert file_id is not None
    return sorted(json.loads(each)["custom_id"] for each in store.path_of(file_id).read_text().splitlines())


async def test_a_frozen_process_writes_nothing_to_a_batch_that_another_one_took(tmp_path: Path) -> None:
    now = 1000.0
    store = await make_store(tmp_path, lines("a", "b"), lambda: now)
    thaw = asyncio.Event()

    async def send_late(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        await thaw.wait()
        return 200, b'"late"'

    rest = asyncio.Event()

    async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        if b'"b"' in body:
            await rest.wait()
        return 200, b"{}"

    first = asyncio.create_task(run(runner_of(store, send_late)))
    async with asyncio.timeout(10):
        while (await store.batch("", "batch_1")).status != "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    now += SILENCE_S + 1
    second = asyncio.create_task(run(runner_of(store, send)))
    output = tmp_path / "files" / "file-1-output"
    await until(output.exists, 10)
    thaw.set()
    await asyncio.sleep(0.1)
    rest.set()
    await until_ended(store)
    for task in (first, second):
        task.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    batch = await store.batch("", "batch_1")
    assert (batch.status, batch.request_counts.completed) == ("completed", 2)
    assert custom_ids(store, batch.output_file_id) == ["a", "b"]
    assert b"late" not in store.path_of(batch.output_file_id or "").read_bytes()
    store.close()


@pytest.mark.parametrize("moment", ["add_file", "update"])
async def test_a_batch_whose_end_cannot_be_written_ends_later_with_all_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    now = 1000.0
    store = await make_store(tmp_path, lines("a", "b"), lambda: now)
    asked: list[bytes] = []
    is_broken = True
    works = getattr(store, moment)

    async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        asked.append(body)
        return 200, b"{}"

    async def fails_at_the_end(first: Any, second: Any) -> Any:
        nonlocal now, is_broken
        if is_broken and (isinstance(second, File) or second.status == "completed"):
            is_broken = False
            now += SILENCE_S + 1
            raise ServiceError("The disk is full.")
        return await works(first, second)

    monkeypatch.setattr(store, moment, fails_at_the_end)
    task = asyncio.create_task(run(runner_of(store, send)))
    await until_ended(store)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    batch = await store.batch("", "batch_1")
    assert (batch.status, batch.request_counts.completed, len(asked)) == ("completed", 2, 2)
    assert custom_ids(store, batch.output_file_id) == ["a", "b"]
    files, _ = await store.files("", after=None, limit=10, descending=True, purpose="batch_output")
    assert [each.id for each in files] == [batch.output_file_id]
    store.close()


async def test_a_full_disk_interrupts_a_batch_and_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    store = await make_store(tmp_path, lines("a", "b", "c"), lambda: now)
    writes = OutputFile.append
    num_writes = 0

    def append(file: OutputFile, line: dict[str, Any]) -> None:
        nonlocal now, num_writes
        num_writes += 1
        if num_writes == 2:
            now += SILENCE_S + 1
            raise OSError(errno.ENOSPC, "No space left on device")
        writes(file, line)

    async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        return 200, b"{}"

    monkeypatch.setattr(OutputFile, "append", append)
    task = asyncio.create_task(run(runner_of(store, send)))
    await until_ended(store)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    batch = await store.batch("", "batch_1")
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    assert custom_ids(store, batch.output_file_id) == ["a", "b", "c"]
    store.close()


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files may have 1,000 bytes."""
    path = tmp_path / "out"
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from fastserve.gateway.batches.lines import OutputFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "file = OutputFile(Path(sys.argv[1]))\n"
        "file.append({'custom_id': 'a'})\n"
        "try: file.append({'custom_id': 'b', 'text': 'x' * 2000})\n"
        "except OSError: file.append({'custom_id': 'c'})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert OutputFile(path).recover() == {"a", "c"}


def test_lines_that_a_broken_disk_has_garbled_are_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b'{"custom_id":"a"}\n\0\0\0\n{"custom_id":"b"}\n')
    assert OutputFile(path).recover() == {"a"}
    assert path.read_bytes() == b'{"custom_id":"a"}\n'


async def test_a_batch_whose_input_is_gone_ends(tmp_path: Path) -> None:
    store = await make_store(tmp_path, lines("a"), lambda: 1000.0)
    claimed = await store.claim("dead")
    assert claimed is not None
    claimed[1].status = "in_progress"
    await store.update("dead", claimed[1])
    await store.let_go("dead")
    store.path_of(claimed[1].input_file_id).unlink()

    async def send(path: str, body: bytes, number: str) -> tuple[int, bytes]:
        return 200, b"{}"

    task = asyncio.create_task(run(runner_of(store, send)))
    async with asyncio.timeout(10):
        while (batch := await store.batch("", "batch_1")).status != "failed":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data] == ["file_not_found"]
    store.close()
