"""Adapters on the worker: names, routes, access and flags, on the fake engine."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastserve.config import ControllerConfig, WorkerConfig
from fastserve.engine.contract import EngineInfo, EngineRequest
from fastserve.engine.fake import Script
from fastserve.errors import StartupError
from fastserve.options import parse_config, to_argv
from fastserve.protocol import MAX_ADAPTER_LIST_BYTES, MAX_ADAPTERS, HeartbeatRequest
from fastserve.text.tokenizer import Tokenizer
from fastserve.worker.adapter_root import AdapterRoot
from fastserve.worker.adapter_source import Adapter, find_adapters
from fastserve.worker.adapters import listed_adapters
from tests.worker.conftest import MODEL, Running, RunWorker, until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("one", "two"):
        make_adapter(root / name)
    make_adapter(tmp_path / "outside")
    return root


@pytest.fixture
def say_adapter(tokenizer: Tokenizer) -> Script:
    """Answers with the name of the request's adapter, or `base`."""

    def script(request: EngineRequest, info: EngineInfo) -> Sequence[int]:
        return tokenizer.encode(request.adapter or "base", add_special_tokens=False)

    return script


async def ask(running: Running, model: str) -> str:
    status, answer = await running.post("/v1/chat/completions", CHAT | {"model": model})
    assert status == 200, answer
    assert answer["model"] == model
    text: str = answer["choices"][0]["message"]["content"]
    return text


async def test_a_name_selects_an_adapter_in_every_generating_route(
    run_worker: RunWorker, say_adapter: Script, root: Path
) -> None:
    async with run_worker(say_adapter, lora_root=str(root)) as running:
        assert await ask(running, MODEL) == "base"
        assert await ask(running, "one") == "one"
        assert await ask(running, f"{MODEL}:two") == "two"
        _, answer = await running.post("/v1/completions", {"model": "one", "prompt": "Hi", "max_tokens": 8})
        assert answer["choices"][0]["text"] == "one"
        _, answer = await running.post("/", {"prompt": "Hi", "generate_config": {"adapter_name": "two"}})
        assert answer["response"] == "two"
        body = {"model": "one", "prompt": "Hi", "echo": False, "max_new_tokens": 8}
        _, answer = await running.post("/worker_generate", body)
        assert answer["text"] == "one"


@pytest.mark.parametrize(
    "name", ["three", f"{MODEL}:three", "other:one", "../outside", f"{MODEL}:", ":one", "one:", "one/", ".", "x" * 600]
)
async def test_an_unknown_name_is_a_404_that_lists_what_there_is(run_worker: RunWorker, root: Path, name: str) -> None:
    async with run_worker(lora_root=str(root)) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 2)
        status, answer = await running.post("/v1/chat/completions", CHAT | {"model": name})
        assert status == 404
        assert answer["error"]["code"] == "model_not_found"
        assert answer["error"]["param"] == "model"
        assert f"Served: {MODEL}, one, two." in answer["error"]["message"]


@pytest.mark.parametrize("field", ["lora_path", "lora_dir", "adapter_id", "adapter_name", "lora", "lora_request"])
async def test_other_servers_fields_for_an_adapter_never_get_an_answer_of_the_base(
    run_worker: RunWorker, root: Path, field: str
) -> None:
    async with run_worker(lora_root=str(root)) as running:
        for path, body in (("chat/completions", CHAT), ("completions", {"prompt": "Hi"})):
            given = body | {"model": MODEL, field: "one"}
            status, answer = await running.post(f"/v1/{path}", given)
            assert (status, answer["error"]["param"]) == (400, field)
            assert "as 'model'" in answer["error"]["message"]
            assert (await running.post(f"/v1/{path}", given | {field: None}))[0] == 200


@pytest.mark.parametrize("path", ["/worker_generate", "/worker_generate_stream"])
@pytest.mark.parametrize("model", ["three", f"{MODEL}:three", "other:one", "one/", 1, ["one"]])
async def test_fastchats_routes_refuse_an_unknown_name_where_there_are_adapters(
    run_worker: RunWorker, root: Path, path: str, model: Any
) -> None:
    body = {"model": model, "prompt": "Hi", "echo": False, "max_new_tokens": 8}
    async with run_worker(lora_root=str(root)) as running:
        async with running.http.post(running.url + path, json=body) as response:
            record = json.loads((await response.read()).rstrip(b"\0"))
        assert record["error_code"] != 0
        assert ("is not served here" if isinstance(model, str) else "'model'") in record["text"]


async def test_fastchats_routes_answer_from_the_base_where_no_adapter_is_named(
    run_worker: RunWorker, say_adapter: Script, root: Path
) -> None:
    body: dict[str, Any] = {"prompt": "Hi", "echo": False, "max_new_tokens": 8}
    async with run_worker(say_adapter, lora_root=str(root)) as running:
        for fields in ({}, {"model": None}, {"model": ""}, {"model": MODEL}):
            assert (await running.post("/worker_generate", body | fields))[1]["text"] == "base"
    async with run_worker(say_adapter) as running:
        assert (await running.post("/worker_generate", body | {"model": "any"}))[1]["text"] == "base"


async def test_models_and_adapters_are_listed_with_their_base(run_worker: RunWorker, root: Path) -> None:
    async with run_worker(lora_root=str(root)) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 2)
        cards = {card.id: card.model_dump() async for card in running.openai.models.list()}
        assert cards.keys() == {MODEL, "one", "two"}
        assert (cards[MODEL]["parent"], cards[MODEL]["root"]) == (None, MODEL)
        assert (cards["one"]["parent"], cards["one"]["root"]) == (MODEL, "one")
        await ask(running, "one")
        async with running.http.get(running.url + "/adapters") as response:
            rows = {row["name"]: row for row in (await response.json())["data"]}
        assert rows["one"] | {"rank": 8, "location": "device", "parent": MODEL} == rows["one"]
        assert rows["two"] | {"rank": None, "location": "disk", "loads": 0} == rows["two"]


async def test_members_of_the_root_appear_and_disappear(run_worker: RunWorker, say_adapter: Script, root: Path) -> None:
    async with run_worker(say_adapter, lora_root=str(root)) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 2)
        digest = running.runtime.status().adapters_digest
        make_adapter(root / "new")
        assert await ask(running, "new") == "new", "also before the folder is listed again"
        await until(lambda: running.runtime.status().adapters_digest != digest)
        (root / "two" / "adapter_config.json").unlink()
        (root / "two").rmdir()
        await until(lambda: "two" not in running.runtime.adapters.served_names())
        assert (await running.post("/v1/chat/completions", CHAT | {"model": "two"}))[0] == 404


def test_the_root_is_listed_again_only_after_a_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while folders in it have no adapter: those that get one are noticed, which the root itself does not show."""
    (root / "empty").mkdir()
    (root / "group" / "deep").mkdir(parents=True)
    now = time.time()
    found = AdapterRoot(root, lambda: now)
    lists: list[Path] = []
    scan = os.scandir

    def listing(path: Path) -> Any:
        lists.append(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", listing)
    listed = found.changes(10)
    assert listed is not None
    assert set(listed) == {"one", "two"}
    assert found.changes(10) is not None, "a change within the same tick of the file system would be missed"
    now += 60
    assert found.changes(10) is not None
    del lists[:]
    for _ in range(5):
        assert found.changes(10) is None
    assert not lists
    (root / "empty" / "adapter_config.json").write_text("{}")
    os.utime(root / "empty", (now, now))
    listed = found.changes(10)
    assert listed is not None
    assert set(listed) == {"one", "two", "empty"}
    assert found.changes(10) is None
    shutil.rmtree(root / "group")
    os.utime(root, (now, now))
    now += 60
    assert found.changes(10) is not None
    assert found.changes(10) is None


async def test_adapters_are_loaded_replaced_and_unloaded_like_vllm_and_sglang(
    run_worker: RunWorker, say_adapter: Script, root: Path
) -> None:
    async with run_worker(say_adapter, lora_root=str(root)) as running:
        body = {"lora_name": "mine", "lora_path": "one"}

        async def call(path: str, fields: Any) -> tuple[int, str]:
            async with running.http.post(running.url + path, json=fields) as response:
                return response.status, await response.text()

        assert await call("/v1/load_lora_adapter", body) == (
            200,
            "Success: LoRA adapter 'mine' added successfully.",
        )
        assert await ask(running, "mine") == "mine"
        status, text = await call("/v1/load_lora_adapter", body)
        assert status == 400
        assert "The lora adapter 'mine' has already been loaded." in text
        assert (await call("/v1/load_lora_adapter", body | {"load_inplace": True}))[0] == 200
        assert await call("/v1/unload_lora_adapter", {"lora_name": "mine"}) == (
            200,
            "Success: LoRA adapter 'mine' removed successfully.",
        )
        assert (await running.post("/v1/chat/completions", CHAT | {"model": "mine"}))[0] == 404
        status, text = await call("/v1/unload_lora_adapter", {"lora_name": "mine"})
        assert (status, "cannot be found" in text) == (404, True)
        status, text = await call("/load_lora_adapter", body)
        assert (status, json.loads(text)["loaded_adapters"]["mine"]) == (200, "one")
        status, text = await call("/unload_lora_adapter", {"lora_name": "mine"})
        assert (status, json.loads(text)["success"]) == (200, True)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"lora_name": "a"}, 400, "lora_path"),
        ({"lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": 3, "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a:b", "lora_path": "one"}, 400, "colon"),
        ({"lora_name": "a\nb", "lora_path": "one"}, 400, "printable"),
        ({"lora_name": "x" * 129, "lora_path": "one"}, 400, "128"),
        ({"lora_name": MODEL, "lora_path": "one"}, 400, "name of the model"),
        ({"lora_name": "a", "lora_path": "one", "base_model_name": "other"}, 400, "base_model_name"),
        ({"lora_name": "a", "lora_path": "one", "pinned": True}, 400, "pinned"),
        ({"lora_name": "a", "lora_path": "one", "load_in_place": True}, 400, "Unknown field"),
        ({"lora_name": "a", "lora_path": "../outside"}, 403, "--allow-any-lora-path"),
        ({"lora_name": "a", "lora_path": "/etc"}, 403, "--allow-any-lora-path"),
        ({"lora_name": "a", "lora_path": "link"}, 403, "--allow-any-lora-path"),
        ({"lora_name": "a", "lora_path": "one\0"}, 403, "--allow-any-lora-path"),
    ],
)
async def test_a_wrong_call_names_the_field_and_changes_nothing(
    run_worker: RunWorker, root: Path, fields: dict[str, Any], status: int, words: str
) -> None:
    deep = root / "group"
    deep.mkdir()
    (root / "link").symlink_to(root.parent, target_is_directory=True)
    async with run_worker(lora_root=str(root)) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 2)
        before = running.runtime.adapters.all()
        found, answer = await running.post("/v1/load_lora_adapter", fields)
        assert (found, words in answer["error"]["message"]) == (status, True), answer
        assert running.runtime.adapters.all() == before


async def test_other_paths_need_an_administrators_option(run_worker: RunWorker, root: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(root.parent / "outside")}
    async with run_worker(lora_root=str(root)) as running:
        assert (await running.post("/v1/load_lora_adapter", body))[0] == 403
    async with run_worker(enable_lora=True, allow_any_lora_path=True) as running:
        async with running.http.post(running.url + "/v1/load_lora_adapter", json=body) as response:
            assert response.status == 200
        status, answer = await running.post("/v1/load_lora_adapter", body | {"lora_name": "b", "lora_path": "/none"})
        assert (status, answer["error"]["param"]) == (400, "lora_path")


async def test_only_administrators_load_adapters(
    run_worker: RunWorker, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSERVE_ADMIN_KEY", "an-administrators-key")
    async with run_worker(lora_root=str(root)) as running:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"):
            status, answer = await running.post(path, {"lora_name": "a", "lora_path": "one"})
            assert (status, answer["error"]["code"]) == (403, "permission_denied")
        async with running.http.post(
            running.url + "/v1/load_lora_adapter",
            json={"lora_name": "a", "lora_path": "one"},
            headers={"authorization": "Bearer an-administrators-key"},
        ) as response:
            assert response.status == 200


async def test_an_adapter_that_was_loaded_by_call_survives_the_engines_restart(
    run_worker: RunWorker, say_adapter: Script, root: Path
) -> None:
    async with run_worker(say_adapter, lora_root=str(root)) as running:
        async with running.http.post(
            running.url + "/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "one"}
        ) as response:
            assert response.status == 200
        running.engine.die("test")
        await until(lambda: not running.worker.keeper.ready)
        await until(lambda: running.worker.keeper.ready)
        assert await ask(running, "mine") == "mine"


@pytest.fixture
def state_file(root: Path) -> str:
    return str(root.parent / "worker.adapters.json")


async def load(running: Running, name: str, source: str, **fields: Any) -> None:
    body = {"lora_name": name, "lora_path": source, **fields}
    async with running.http.post(running.url + "/v1/load_lora_adapter", json=body) as response:
        assert response.status == 200, await response.text()


async def unload(running: Running, name: str) -> None:
    async with running.http.post(running.url + "/v1/unload_lora_adapter", json={"lora_name": name}) as response:
        assert response.status == 200, await response.text()


async def test_the_outcomes_of_calls_outlive_a_restart_of_the_worker(
    run_worker: RunWorker, say_adapter: Script, root: Path, state_file: str
) -> None:
    make_adapter(root / "three")
    flags: dict[str, Any] = {
        "lora_root": str(root),
        "lora_modules": (f"flag={root}/one", f"other={root}/one", f"third={root}/one"),
        "lora_state_file": state_file,
    }
    async with run_worker(say_adapter, **flags) as running:
        await load(running, "mine", "one")
        await load(running, "gone", "two")
        await unload(running, "gone")
        await load(running, "other", "two", load_inplace=True)
        await unload(running, "third")
        await unload(running, "three")
    for _ in range(2):
        async with run_worker(say_adapter, **flags) as running:
            await until(lambda: "two" in running.runtime.adapters.served_names())
            served = {adapter.name: Path(adapter.path).name for adapter in running.runtime.adapters.all()}
            assert served == {"flag": "one", "other": "two", "mine": "one", "one": "one", "two": "two"}
            for name in served:
                assert await ask(running, name) == name
            infos = {adapter.name: info for adapter, info in await running.runtime.adapters.infos()}
            assert infos["other"] is not None
            assert Path(infos["other"].path).name == "two"
    assert os.stat(state_file).st_mode & 0o77 == 0


async def test_an_adapter_whose_folder_is_gone_is_a_line_in_the_log(
    run_worker: RunWorker, say_adapter: Script, root: Path, state_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, Any] = {"lora_root": str(root), "lora_state_file": state_file}
    async with run_worker(say_adapter, **flags) as running:
        await load(running, "mine", "one")
        await load(running, "kept", "two")
    shutil.rmtree(root / "one")
    async with run_worker(say_adapter, **flags) as running:
        assert await ask(running, "kept") == "kept"
        assert (await running.post("/v1/chat/completions", CHAT | {"model": "mine"}))[0] == 404
    assert "The adapter mine, which was loaded by call, is not served again" in caplog.text


BROKEN = {
    "empty": b"",
    "cut": b"{",
    "a list": b"[]",
    "a number": b'{"loaded": 5}',
    "a path that is a number": b'{"loaded": {"a": 1}}',
    "no text": b"\xff",
    "deep": b"[" * 10_000,
    "names that no adapter has": b'{"loaded": {"a:b": "one", "fastserve-demo": "one"}}',
    "a path that is not allowed": b'{"loaded": {"c": "../outside"}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_file_of_adapters_is_no_failed_start(
    run_worker: RunWorker, root: Path, state_file: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with open(state_file, "wb") as file:  # noqa: ASYNC230
        file.write(content)
    async with run_worker(lora_root=str(root), lora_state_file=state_file) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 2)
    assert "not served again" in caplog.text


async def test_a_worker_without_adapters_says_how_to_have_them(run_worker: RunWorker) -> None:
    async with run_worker(prepare=lambda options: setattr(options, "adapters", None)) as running:
        status, answer = await running.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"})
        assert (status, "--enable-lora" in answer["error"]["message"]) == (400, True)
        assert running.runtime.status().adapters_digest == ""


async def test_the_number_of_adapters_is_bounded(run_worker: RunWorker, root: Path) -> None:
    members = ["one", "two", *(f"more-{number}" for number in range(5))]
    for name in members[2:]:
        make_adapter(root / name)
    async with run_worker(lora_root=str(root), max_adapters=4) as running:
        await until(lambda: len(running.runtime.adapters.all()) == 4)
        served = running.runtime.adapters.served_names()
        left_out = next(name for name in members if name not in served)
        status, answer = await running.post("/v1/chat/completions", CHAT | {"model": left_out})
        assert (status, "--max-adapters" in answer["error"]["message"]) == (429, True)


@pytest.mark.parametrize(
    ("name", "source", "num_listed", "has_roots"),
    [
        ("{:04}", "one", MAX_ADAPTERS, True),
        ("{:04}", "/" + "\N{SNOWMAN}" * 600, MAX_ADAPTERS, False),
        ("{:04}" + "\N{GRINNING FACE}" * 124, "one", 900, False),
        ("{:04}", "one\udcff", MAX_ADAPTERS, True),
    ],
)
def test_the_list_for_the_controller_is_bounded_in_bytes(
    name: str, source: str, num_listed: int, has_roots: bool
) -> None:
    adapters = [Adapter(name.format(number), source, "/path") for number in range(MAX_ADAPTERS)]
    listed = listed_adapters(adapters)
    assert num_listed <= len(listed) <= MAX_ADAPTERS
    assert [entry.name for entry in listed] == [one.name for one in adapters[: len(listed)]]
    assert all(bool(entry.root) is has_roots for entry in listed)
    beat = HeartbeatRequest(worker_name="http://worker", queue_length=0, adapters=listed).model_dump_json()
    assert len(beat.encode()) <= MAX_ADAPTER_LIST_BYTES + 1000 < ControllerConfig().max_body_bytes
    assert HeartbeatRequest.model_validate_json(beat).adapters == listed


# ---- flags ------------------------------------------------------------------------------------------------------


def adapters_of(argv: Sequence[str], **environ: str) -> dict[str, Adapter]:
    config = parse_config(WorkerConfig, argv, "worker", environ)
    assert parse_config(WorkerConfig, to_argv(config), "worker", {}) == config
    return {adapter.name: adapter for adapter in find_adapters(config, ("base",))}


def test_flags_of_vllm_slora_and_rtp_llm_name_adapters(root: Path) -> None:
    one, two = str(root / "one"), str(root / "two")
    found = adapters_of(
        ["--lora-modules", f"a={one}", json.dumps({"name": "b", "path": two, "base_model_name": "base"}),
         "--lora-dirs", one, "--lora-dirs", f"c={two}", "--lora-dirs", f"{one}-0", f"{one}-1",
         "--lora-modules", "words=fastserve-demo-words"],
        LORA_INFO=json.dumps({"d": one}),
    )  # fmt: skip
    assert {name: Path(adapter.path).name for name, adapter in found.items()} == {
        "a": "one", "b": "two", "one": "one", "c": "two", "one-0": "one", "one-1": "one", "d": "one",
        "words": "fastserve-demo-words",
    }  # fmt: skip
    assert adapters_of([], LORA_INFO="{}") == {}


@pytest.mark.parametrize(("text", "serves"), [("{}", False), (" { }\n", False), ('{"a": "/a"}', True)])
def test_a_worker_without_adapters_in_lora_info_is_one_without_adapters(text: str, serves: bool) -> None:
    assert parse_config(WorkerConfig, [], "worker", {"LORA_INFO": text}).serves_adapters is serves


def test_more_adapters_than_a_controller_lists_are_refused_at_start() -> None:
    assert parse_config(WorkerConfig, ["--max-adapters", str(MAX_ADAPTERS)], "worker", {}).max_adapters == MAX_ADAPTERS
    with pytest.raises(SystemExit):
        parse_config(WorkerConfig, ["--max-adapters", str(MAX_ADAPTERS + 1)], "worker", {})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora-modules", "a"], "NAME=PATH"),
        (["--lora-modules", "base={one}"], "name of the model"),
        (["--lora-modules", "a:b={one}"], "colon"),
        (["--lora-modules", "a={one}", "a={one}"], "given twice"),
        (["--lora-modules", "a=/none/such"], "no such folder"),
        (["--lora-modules", "a={root}"], "adapter_config.json"),
        (["--lora-modules", "{{"], "JSON"),
        (["--lora-modules", '{{"name": "a", "path": "{one}", "base_model_name": "x"}}'], "is for the model"),
        (["--lora-dirs", "{one}-none"], "no such folder"),
    ],
)
def test_a_wrong_flag_is_an_error_at_start(root: Path, argv: list[str], words: str) -> None:
    given = [word.format(one=root / "one", root=root) for word in argv]
    with pytest.raises(StartupError, match=words.replace("(", r"\(")):
        adapters_of(given)
