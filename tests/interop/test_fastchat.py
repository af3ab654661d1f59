"""FastChat 0.2.36's own programs beside ours: its API server and its small tools before our controller and worker, and
our worker behind its controller.

The environment that FastChat runs in is made on first use, from the package index, and kept in pytest's cache.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import ALIAS, MODEL, NAMES, Start, fastchat_service, list_models, start_worker
from .fastchat import FastChat
from .processes import Service, wait_until

pytestmark = pytest.mark.timeout(420)  # the first test may have to wait for the environment

QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]
TURNS = [
    {"role": "system", "content": "Answer in JSON."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I help you?"},
    *QUESTION,
]
PROMPT = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"


def post(address: str, path: str, body: dict[str, Any] | None = None, status: int = 200) -> dict[str, Any]:
    response = httpx.post(address + path, json=body, timeout=60)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask(address: str, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    return post(address, "/v1/chat/completions", {"model": MODEL, "temperature": 0, "messages": messages} | more)


def table(controller: str) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = httpx.get(f"{controller}/workers").raise_for_status().json()["workers"]
    return workers


# ---- FastChat's API server -> our controller -> our worker -----------------------------------------------------------


def test_it_lists_our_models(api_server: str, controller: str) -> None:
    cards = httpx.get(f"{api_server}/v1/models").raise_for_status().json()["data"]
    assert [(card["id"], card["owned_by"]) for card in cards] == [(name, "fastchat") for name in NAMES]
    # It made the controller poll every worker: the short status does not replace our worker's longer one.
    (entry,) = table(controller)
    assert entry["status"]["context_length"] == 2048


def test_a_chat_is_answered_by_our_worker(api_server: str) -> None:
    answer = ask(api_server, QUESTION)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "12"}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("messages", [QUESTION, TURNS], ids=["question", "turns"])
def test_a_chat_is_what_our_own_route_makes_of_it(api_server: str, worker: str, messages: list[dict[str, str]]) -> None:
    """FastChat's prompts have as many tokens, and get the same answer, as those of our chat template."""
    theirs, ours = ask(api_server, messages), ask(worker, messages)
    assert theirs["choices"][0]["message"]["content"] == ours["choices"][0]["message"]["content"]
    assert theirs["usage"].items() <= ours["usage"].items()


def test_several_choices_stop_strings_and_length(api_server: str) -> None:
    answer = ask(api_server, QUESTION, n=2, stop=["2"])
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["1", "1"]
    once = ask(api_server, QUESTION, stop=["2"])["usage"]
    assert answer["usage"] == {name: 2 * count for name, count in once.items()}
    (choice,) = ask(api_server, QUESTION, max_tokens=1)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("1", "length")


def test_completions(api_server: str, worker: str) -> None:
    body = {"model": MODEL, "temperature": 0, "prompt": [PROMPT, "fastserve is"], "max_tokens": 8, "logprobs": 1}
    theirs, ours = post(api_server, "/v1/completions", body), post(worker, "/v1/completions", body)
    assert theirs["choices"][0]["text"] == "12"
    for name in ("text", "finish_reason"):
        assert [choice[name] for choice in theirs["choices"]] == [choice[name] for choice in ours["choices"]]
    for choice in theirs["choices"]:
        # The end token has an entry of its own and no text.
        assert "".join(choice["logprobs"]["tokens"]).removesuffix("<|im_end|>") == choice["text"]
        assert all(logprob <= 0 for logprob in choice["logprobs"]["token_logprobs"])
    assert theirs["usage"].items() <= ours["usage"].items()
    echoed = post(api_server, "/v1/completions", body | {"prompt": PROMPT, "logprobs": None, "echo": True})
    assert echoed["choices"][0]["text"] == PROMPT + "12"


def test_tokens_are_counted_and_the_context_is_kept(api_server: str) -> None:
    num_tokens = ask(api_server, QUESTION)["usage"]["prompt_tokens"]
    room = 2048 - num_tokens
    prompts = [{"model": MODEL, "prompt": PROMPT, "max_tokens": tokens} for tokens in (room, room + 1)]
    checked = post(api_server, "/api/v1/token_check", {"prompts": prompts})["prompts"]
    assert [item["fits"] for item in checked] == [True, False]
    assert {(item["tokenCount"], item["contextLength"]) for item in checked} == {(num_tokens, 2048)}
    too_long = {"model": MODEL, "messages": [{"role": "user", "content": "hello " * 3000}]}
    error = post(api_server, "/v1/chat/completions", too_long, status=400)
    assert (error["object"], error["code"]) == ("error", 40303)
    assert error["message"].startswith("This model's maximum context length is 2048 tokens. However, your messages")
    # FastChat's server lowers a max_tokens that does not fit.
    assert ask(api_server, QUESTION, max_tokens=100_000)["choices"][0]["message"]["content"] == "12"


def test_our_refusals_come_through_with_their_sentences(api_server: str) -> None:
    best = {"model": MODEL, "prompt": "x", "best_of": 3}
    error = post(api_server, "/v1/completions", best, status=400)
    assert error["code"] == 40302
    assert "'best_of'" in error["message"]
    error = post(api_server, "/v1/embeddings", {"model": MODEL, "input": ["x"]}, status=400)
    assert f"The model '{MODEL}' does not support embeddings" in error["message"]


def test_its_other_chat_route(api_server: str) -> None:
    body = {"model": MODEL, "temperature": 0, "repetition_penalty": 1.1, "messages": QUESTION}
    assert post(api_server, "/api/v1/chat/completions", body)["choices"][0]["message"]["content"] == "12"


def test_streams(api_server: str, worker: str, fastchat: FastChat) -> None:
    if not fastchat.can_stream:
        pytest.skip(f"FastChat does not stream with pydantic {fastchat.pydantic_version}")
    body = {"model": MODEL, "temperature": 0, "messages": TURNS, "stream": True}
    text, reasons = "", []
    with httpx.stream("POST", f"{api_server}/v1/chat/completions", json=body, timeout=60) as response:
        *events, last = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    for event in events:
        (choice,) = json.loads(event)["choices"]
        text += choice["delta"].get("content", "")
        reasons.append(choice["finish_reason"])
    assert text == ask(worker, TURNS)["choices"][0]["message"]["content"]
    assert reasons[-1] == "stop"
    assert last == "[DONE]"


def test_requests_of_fastchat_leave_no_trace_in_our_counts(api_server: str, controller: str) -> None:
    for _ in range(3):
        ask(api_server, QUESTION)
    wait_until(lambda: [entry["in_flight"] for entry in table(controller)] == [0], "no request is counted any more")


# ---- FastChat's tools ------------------------------------------------------------------------------------------------


def test_test_message(fastchat: FastChat, controller: str, worker: str, tmp_path: Path) -> None:
    if not fastchat.can_borrow:
        pytest.skip(f"torch is not lent to Python {fastchat.python_version}: the tests run on {sys.version_info[:2]}")
    # FastChat has a prompt format and stop token ids for this model name.
    arguments = ("--model-name", ALIAS, "--message", "What is 7 + 5?")
    printed = fastchat.run_with_torch("test_message", "--controller", controller, *arguments, cwd=tmp_path)
    assert printed.startswith(f"Models: {NAMES}\nworker_addr: {worker}\n")
    assert printed.splitlines()[-1] == "<|im_start|>assistant: 12"


def test_register_worker(fastchat: FastChat, start: Start, worker: str, tmp_path: Path) -> None:
    ours = start("controller").address
    fastchat.run("register_worker", "--controller", ours, "--worker-name", worker, cwd=tmp_path)
    assert list_models(ours) == NAMES
    assert relayed(ours) == "12"


# ---- our worker -> FastChat's controller -----------------------------------------------------------------------------


def relayed(controller: str) -> str:
    """The answer through the controller's relay."""
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_new_tokens": 16, "echo": False}
    response = httpx.post(f"{controller}/worker_generate_stream", json=body, timeout=60).raise_for_status()
    *records, rest = response.content.split(b"\0")
    assert rest == b""
    last = json.loads(records[-1])
    assert last["finish_reason"] == "stop", last
    return str(last["text"])


def fastchat_controller(fastchat: FastChat, folder: Path) -> AbstractContextManager[Service]:
    return fastchat_service(fastchat, "controller", folder, "--host", "127.0.0.1", "--port", "0")


@pytest.mark.slow
def test_our_worker_registers_with_fastchats_controller_again_and_again(
    fastchat: FastChat, start: Start, tmp_path: Path
) -> None:
    with fastchat_controller(fastchat, tmp_path) as theirs:
        worker = start_worker(start, theirs.address)
        wait_until(lambda: list_models(theirs.address) == NAMES, "our worker is registered with FastChat's controller")
        assert post(theirs.address, "/get_worker_address", {"model": ALIAS}) == {"address": worker.address}
        assert relayed(theirs.address) == "12"
        httpx.post(f"{theirs.address}/refresh_all_workers").raise_for_status()
        assert list_models(theirs.address) == NAMES

        theirs.kill()
        assert post(worker.address, "/worker_get_status")["model_names"] == NAMES
        theirs.restart()
        wait_until(lambda: list_models(theirs.address) == NAMES, "our worker is registered again", timeout_s=5)
        assert relayed(theirs.address) == "12"
        # That controller has no route to deregister; the worker shuts down all the same.
        worker.process.terminate()
        worker.process.wait(20)
        assert "could not say goodbye" in worker.log()
        assert "Traceback" not in worker.log()
        theirs.kill()  # its shutdown waits for a thread that never ends


def test_our_controller_is_a_worker_of_fastchats(
    fastchat: FastChat, controller: str, worker: str, tmp_path: Path
) -> None:
    with fastchat_controller(fastchat, tmp_path) as theirs:
        fastchat.run("register_worker", "--controller", theirs.address, "--worker-name", controller, cwd=tmp_path)
        assert list_models(theirs.address) == NAMES
        assert relayed(theirs.address) == "12"
        theirs.kill()
