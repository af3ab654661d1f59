"""The launcher as a command, with stand-in services: starts, refusals, and cleanup after failures."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastserve.launching.console import Console
from tests.processes import free_ports, is_alive

from .launching import Sandbox, dump, wait_until


def test_services_run_on_after_the_launcher_has_gone(sandbox: Sandbox) -> None:
    model = sandbox.model()
    result = sandbox.launch("--model-path-address", sandbox.item(model))
    assert result.returncode == 0, result.stderr
    assert f"API server  http://127.0.0.1:{sandbox.server_port}" in result.stdout
    assert f"controller  http://127.0.0.1:{sandbox.controller_port}" in result.stdout
    assert f"worker      http://127.0.0.1:{sandbox.worker_port}  {model}" in result.stdout
    assert f"base_url for the OpenAI SDK: http://127.0.0.1:{sandbox.server_port}/v1" in result.stdout
    order = [result.stdout.index(f"{name} is ready at") for name in ("controller", "openai_api_server")]
    assert order == sorted(order)
    pids = sandbox.services()
    assert set(pids) == {"controller", "model_worker", "openai_api_server"}
    for pid in pids.values():
        # It has its own session, so neither the terminal's hang-up nor Ctrl-C reaches it.
        assert os.getsid(pid) == pid
    for port in (sandbox.controller_port, sandbox.server_port, sandbox.worker_port):
        assert dump(port)["argv"]
    names = {path.name for path in sandbox.logs.glob("*.log")}
    assert names == {
        "controller.log",
        "launcher.log",
        "openai_api_server.log",
        f"worker_model_127_0_0_1_{sandbox.worker_port}.log",
    }


def test_missing_log_folder_is_made_and_a_line_of_an_earlier_day_is_no_sign_of_life(sandbox: Sandbox) -> None:
    nested = sandbox.folder / "deep" / "er"
    assert sandbox.launch("--model-path-address", sandbox.item(sandbox.model()), "--log-dir", "deep/er").returncode == 0
    sandbox.clear()
    (nested / "controller.log").write_text("Uvicorn running on an earlier day\n")
    result = sandbox.launch(
        "--model-path-address", sandbox.item("model"), "--log-dir", "deep/er", STANDIN_MOOD="controller=die"
    )
    assert result.returncode == 1
    assert "earlier day" not in (nested / "controller.log").read_text()
    assert "earlier day" in (nested / "controller.log.1").read_text()


def test_log_folder_that_cannot_be_made(sandbox: Sandbox) -> None:
    sandbox.logs.write_text("a file")
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()))
    assert result.returncode == 1
    assert result.stderr == "--log-dir logs: the folder cannot be made (File exists).\n"


def test_log_that_cannot_be_written(sandbox: Sandbox) -> None:
    (sandbox.logs / "openai_api_server.log").mkdir(parents=True)
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()))
    assert result.returncode == 1
    assert result.stderr == f"The log {sandbox.logs}/openai_api_server.log cannot be written: Is a directory.\n"
    assert sandbox.services() == {}
    assert sandbox.strays() == []


@pytest.mark.parametrize("kind", ["controller", "model_worker", "openai_api_server"])
def test_child_that_dies_ends_the_launch_with_its_cause(sandbox: Sandbox, kind: str) -> None:
    started = time.monotonic()
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model()), STANDIN_MOOD=f"{kind}=die")
    output, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert process.returncode == 1
    name = (
        f"model_worker {sandbox.folder / 'model'}@127.0.0.1@{sandbox.worker_port}" if kind == "model_worker" else kind
    )
    first, second, *lines = errors.splitlines()
    assert first == f"{name} ended with exit code 3: The checkpoint has no config.json."
    assert second.startswith(f"The last lines of {sandbox.logs}/")
    assert len(lines) == 20
    assert "step 29" in lines[-2]
    assert "Taking down what was started: controller" in output
    assert "fastserve is running" not in output
    assert sandbox.services() == {}
    assert not list(sandbox.logs.glob("*.json"))
    assert sandbox.strays() == []


def test_models_load_while_the_controller_starts(sandbox: Sandbox) -> None:
    item = sandbox.item(sandbox.model())
    result = sandbox.launch("--model-path-address", item, "--wait-timeout-s", "2", STANDIN_MOOD="controller=mute")
    assert "controller did not serve within 2 s" in result.stderr
    assert f"Taking down what was started: controller, model_worker {item}" in result.stdout
    assert sandbox.strays() == []


def test_child_killed_by_a_signal_is_told(sandbox: Sandbox) -> None:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model(mood="killed")))
    assert result.returncode == 1
    assert "was killed by SIGKILL" in result.stderr
    assert sandbox.strays() == []


def test_child_that_dies_after_it_served_while_others_load(sandbox: Sandbox) -> None:
    item = sandbox.item(sandbox.model(mood="mute"))
    result = sandbox.launch("--model-path-address", item, STANDIN_MOOD="controller=late")
    assert result.returncode == 1
    assert "controller ended with exit code 7" in result.stderr
    assert sandbox.strays() == []


def test_timeout_names_the_service_and_takes_down_everything(sandbox: Sandbox) -> None:
    item = sandbox.item(sandbox.model(mood="mute"))
    process = sandbox.start("--model-path-address", item, "--wait-timeout-s", "3")
    pids = wait_until(lambda: len(sandbox.services()) == 3 and sandbox.services(), "three services")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "did not serve within 3 s (--wait-timeout-s): loading the weights: 40 %" in errors
    assert not any(is_alive(pid) for pid in pids.values())
    assert sandbox.strays() == []


def test_worker_that_does_not_register(sandbox: Sandbox) -> None:
    words = ("--model-path-address", sandbox.item(sandbox.model()), "--wait-timeout-s", "4")
    result = sandbox.launch(*words, STANDIN_MOOD="controller=lonely")
    assert result.returncode == 1
    assert "not all of the 1 workers have registered with the controller" in result.stderr
    assert sandbox.strays() == []
    assert sandbox.launch(*words, "--no-register", STANDIN_MOOD="controller=lonely").returncode == 0


def test_a_worker_that_answers_while_it_loads_is_waited_for(sandbox: Sandbox) -> None:
    """For the whole of --wait-timeout-s, while registering has a shorter timeout."""
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model(mood="loading")))
    assert result.returncode == 0, result.stderr
    found = re.search(r"^model_worker .* is ready at .* \(([\d.]+) s\)$", result.stdout, re.MULTILINE)
    assert found is not None
    assert float(found[1]) >= 2.0


def test_running_is_said_when_a_request_can_be_answered(sandbox: Sandbox) -> None:
    words = ("--model-path-address", sandbox.item(sandbox.model()))
    result = sandbox.launch(*words, STANDIN_MOOD="openai_api_server=unready")
    assert result.returncode == 0, result.stderr
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.server_port, timeout=5)
    connection.request("GET", "/ready")
    assert connection.getresponse().status == 200
    connection.close()


def test_stubborn_services_and_a_workers_engine_are_killed_too(sandbox: Sandbox) -> None:
    items = [
        sandbox.item(sandbox.model("a", "engine")),
        sandbox.item(sandbox.model("b", "die"), port=sandbox.other_port),
    ]
    result = sandbox.launch("--model-path-address", *items, STANDIN_MOOD="controller=stubborn")
    assert result.returncode == 1
    assert sandbox.strays() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_during_the_launch_takes_it_back(sandbox: Sandbox, number: signal.Signals) -> None:
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model(mood="mute")))
    wait_until(lambda: len(sandbox.services()) == 3, "three services")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors == f"The launch was ended by {number.name}.\n"
    assert sandbox.services() == {}
    assert sandbox.strays() == []


@pytest.mark.parametrize("flag", ["--controller-port", "--server-port", "--model-path-address"])
def test_port_in_use_is_refused_at_once(sandbox: Sandbox, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        items = [sandbox.item(sandbox.model())]
        words = ["--model-path-address", *items]
        if flag == "--model-path-address":
            words.append(sandbox.item("model", port=port))
            flag = f"--model-path-address model@127.0.0.1@{port}"
        else:
            words += [flag, str(port)]
        result = sandbox.launch(*words)
    assert result.returncode == 1
    assert result.stderr == f"Cannot listen on 127.0.0.1:{port} ({flag}): the port is in use by another program.\n"
    assert sandbox.strays() == []


def test_refusals_are_one_sentence_and_exit_code_1(sandbox: Sandbox) -> None:
    sandbox.model()
    cases = {
        ("--gpus", "0", "--num-gpus", "2"): "Larger --num-gpus (2) than --gpus 0!\n",
        ("--model-path-address", sandbox.item("./none")): (
            "The model './none' is missing: there is no such file or folder, and it is no "
            "Hugging Face id (owner/name).\n"
        ),
        ("--model-path-address", "model@127.0.0.1"): (
            "--model-path-address 'model@127.0.0.1': an item has the form MODEL@HOST@PORT "
            "or MODEL@HOST@PORT?OPTION=VALUE&OPTION=VALUE.\n"
        ),
    }
    for words, sentence in cases.items():
        result = sandbox.launch(*words)
        assert (result.returncode, result.stderr) == (1, sentence)
    assert sandbox.strays() == []


def test_unknown_flag_is_argparses_message(sandbox: Sandbox) -> None:
    result = sandbox.launch("--colour", "red")
    assert result.returncode == 2
    assert "unrecognized arguments: --colour red" in result.stderr
    result = sandbox.launch("--dispatch-method", "dice")
    assert result.returncode == 2
    assert "invalid choice: 'dice'" in result.stderr


def test_workers_load_side_by_side_with_their_own_options(sandbox: Sandbox) -> None:
    ports = free_ports(3)
    items = [
        sandbox.item(sandbox.model("a"), "?model-names=x,y&gpus=0,1&num-gpus=2", ports[0]),
        sandbox.item(sandbox.model("b"), "?device=cpu&dtype=bfloat16", ports[1]),
        sandbox.item("a", "", ports[2]),
    ]
    result = sandbox.launch("--model-path-address", *items, "--model-names", "p,q", CUDA_VISIBLE_DEVICES="2,3")
    assert result.returncode == 0, result.stderr
    first, second, third = map(dump, ports)
    assert first["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert second["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "x,y" in first["argv"]
    assert "p,q" in second["argv"]
    assert "p,q" in third["argv"]
    assert {"--device=cpu", "--dtype=bfloat16"} <= set(second["argv"])
    runs = [dump(port)["env"]["FASTSERVE_RUN"] for port in ports]
    assert len(set(runs)) == 1


def test_workers_are_all_started_before_the_first_serves(sandbox: Sandbox) -> None:
    items = [sandbox.item(sandbox.model("a", "mute")), sandbox.item(sandbox.model("b"), port=sandbox.other_port)]
    process = sandbox.start("--model-path-address", *items)
    wait_until(lambda: (sandbox.logs / "openai_api_server.log").exists(), "the API server's start")
    dump_b = wait_until(lambda: psutil.Process(process.pid).children(), "children")
    assert dump_b
    line = f"model_worker {sandbox.folder / 'b'}@127.0.0.1@{sandbox.other_port} is ready"
    assert process.stdout is not None
    wait_until(lambda: line in (process.stdout.readline() if process.stdout else ""), line)
    process.terminate()
    process.communicate(timeout=20)


@pytest.mark.parametrize(
    "name", ["my models/a b", "$(touch pwned); `touch pwned`& m", "C:\\models\\m", "a@b/m", 'it\'s "m"?']
)
def test_any_path_is_harmless(sandbox: Sandbox, name: str) -> None:
    sandbox.model(name)
    result = sandbox.launch("--model-path-address", sandbox.item(name))
    assert result.returncode == 0, result.stderr
    assert f"--model-path={name}" in dump(sandbox.worker_port)["argv"]
    assert not (sandbox.folder / "pwned").exists()


def test_keys_stand_in_no_process_list_log_or_output(sandbox: Sandbox) -> None:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()), "--api-keys", "sk-first,sk-second")
    assert result.returncode == 0, result.stderr
    assert dump(sandbox.server_port)["env"]["FASTSERVE_API_KEYS"] == "sk-first,sk-second"
    assert "FASTSERVE_API_KEYS" not in dump(sandbox.worker_port)["env"]
    listed = [word for pid in sandbox.services().values() for word in psutil.Process(pid).cmdline()]
    written = [path.read_text() for path in sandbox.logs.iterdir()]
    assert not any("sk-" in text for text in (*listed, *written, result.stdout, result.stderr))


def test_keys_by_file(sandbox: Sandbox) -> None:
    (sandbox.folder / "keys.txt").write_text("sk-filed\n")
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()), "--api-keys-file", "keys.txt")
    assert result.returncode == 0, result.stderr
    assert "--api-keys-file=keys.txt" in dump(sandbox.server_port)["argv"]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_a_launch_on_ipv6_alone(sandbox: Sandbox) -> None:
    item = f"{sandbox.model()}@[::1]@{sandbox.worker_port}"
    result = sandbox.launch("--controller-host", "::1", "--server-host", "::1", "--model-path-address", item)
    assert result.returncode == 0, result.stderr
    assert f"API server  http://[::1]:{sandbox.server_port}\n" in result.stdout
    assert f"curl -N 'http://[::1]:{sandbox.server_port}/v1/chat/completions'" in result.stdout
    assert f"--controller-address=http://[::1]:{sandbox.controller_port}" in dump(sandbox.worker_port, "::1")["argv"]
    assert "--host=::1" in dump(sandbox.server_port, "::1")["argv"]
    again = sandbox.launch("--controller-host", "::1", "--server-host", "::1", "--model-path-address", item)
    assert "is in use by the controller of an earlier launch" in again.stderr
    assert sandbox.shutdown().returncode == 0


def test_flags_without_effect_are_told(sandbox: Sandbox) -> None:
    result = sandbox.launch("--model-path-address", sandbox.item(sandbox.model()), "--worker-port", "5")
    assert "--worker-port has no effect: each item of --model-path-address names its model" in result.stdout


def test_a_launch_on_ports_of_an_earlier_one_names_it(sandbox: Sandbox) -> None:
    words = ("--model-path-address", sandbox.item(sandbox.model()))
    assert sandbox.launch(*words).returncode == 0
    result = sandbox.launch(*words)
    assert result.returncode == 1
    assert "is in use by the controller of an earlier launch" in result.stderr
    assert "python -m fastserve.shutdown" in result.stderr
    assert len(sandbox.services()) == 3
    assert all(is_alive(pid) for pid in sandbox.services().values())


def test_progress_is_a_line_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w") as file:
        console = Console(file)
        for _ in range(100):
            console.show_progress("waiting")
        console.say("done")
    assert path.read_text() == "done\n"


def test_progress_is_rewritten_on_a_terminal(sandbox: Sandbox) -> None:
    main_end, terminal = os.openpty()
    process = sandbox.start("--model-path-address", sandbox.item(sandbox.model(mood="mute")), stdout=terminal)
    os.close(terminal)
    text = ""
    deadline = time.monotonic() + 30
    while "\r\x1b[Kwaiting 0 s for model_worker" not in text and time.monotonic() < deadline:
        text += os.read(main_end, 65536).decode()
    process.terminate()
    process.communicate(timeout=20)
    os.close(main_end)
    assert "\r\x1b[Kwaiting 0 s for model_worker" in text
    assert text.count("\n") < 10


def test_the_launcher_itself_is_light() -> None:
    heavy = ("torch", "fastapi", "uvicorn", "aiohttp")
    code = f"import sys, fastserve.launcher; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
