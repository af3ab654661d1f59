"""The plan of a launch, without starting anything: flags, items, environments, log names."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest

from fastserve.config import ApiServerConfig, ClassicLauncherFlags, ControllerConfig, LauncherConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.launching.checks import check, check_model
from fastserve.launching.plan import ChildSpec, LaunchPlan, parse_item, plan, summary
from fastserve.options import (
    build_parser,
    expand_abbreviations,
    flag_of,
    limit,
    limits_of,
    option,
    parse_config,
    pass_on,
)
from fastserve.serving.listen import port_problem

LOOPBACK = "127.0.0.1" if port_problem("127.0.0.1", 0) is None else "[::1]"


def parse(*words: str, environ: dict[str, str] | None = None) -> LauncherConfig:
    return parse_config(LauncherConfig, words, "launcher", environ or {})


def planned(*words: str, environ: dict[str, str] | None = None) -> LaunchPlan:
    config = parse(*words, environ=environ)
    return plan(config, [parse_item(text) for text in config.model_path_address], environ or {})


def arguments(spec: ChildSpec) -> tuple[str, ...]:
    return spec.argv[3:]


def worker(spec: ChildSpec) -> WorkerConfig:
    return parse_config(WorkerConfig, arguments(spec), "worker", {})


def test_classic_flags_and_defaults_are_those_of_the_old_launcher() -> None:
    defaults = {flag_of(item): item.default for item in dataclasses.fields(ClassicLauncherFlags)}
    # The four that differ: --model-path-address, --device, --gpus, --limit-worker-concurrency.
    assert defaults == {
        "--model-path-address": ("fastserve-demo@localhost@20002",),
        "--controller-host": "localhost",
        "--controller-port": 21001,
        "--dispatch-method": "shortest_queue",
        "--worker-host": "localhost",
        "--worker-port": 21002,
        "--model-path": "lmsys/vicuna-7b-v1.3",
        "--revision": "main",
        "--device": None,
        "--gpus": None,
        "--num-gpus": 1,
        "--max-gpu-memory": "20GiB",
        "--load-8bit": False,
        "--cpu-offloading": False,
        "--gptq-ckpt": None,
        "--gptq-wbits": 16,
        "--gptq-groupsize": -1,
        "--gptq-act-order": False,
        "--model-names": None,
        "--limit-worker-concurrency": None,
        "--stream-interval": 2,
        "--no-register": False,
        "--server-host": "localhost",
        "--server-port": 8888,
        "--allow-credentials": False,
        "--api-keys": None,
    }


def test_default_launch_reaches_three_services_at_their_addresses() -> None:
    services = planned()
    assert [spec.kind for spec in services.services] == ["controller", "model_worker", "openai_api_server"]
    assert [spec.address for spec in services.services] == [
        "http://localhost:21001",
        "http://localhost:20002",
        "http://localhost:8888",
    ]
    assert worker(services.workers[0]) == WorkerConfig(
        model_path="fastserve-demo", port=20002, max_gpu_memory="20GiB", worker_address="http://localhost:20002"
    )
    server = parse_config(ApiServerConfig, arguments(services.server), "server", {})
    assert server == ApiServerConfig(port=8888)
    assert parse_config(ControllerConfig, arguments(services.controller), "controller", {}) == ControllerConfig()


@pytest.mark.parametrize(
    ("words", "child", "expected"),
    [
        (["--controller-host", "h", "--controller-port", "1"], "controller", {"host": "h", "port": 1}),
        (["--dispatch-method", "lottery"], "controller", {"dispatch_method": "lottery"}),
        (["--log-level", "debug"], "controller", {"log_level": "debug"}),
        (["--server-host", "h", "--server-port", "1"], "server", {"host": "h", "port": 1}),
        (["--controller-host", "h", "--controller-port", "1"], "server", {"controller_address": "http://h:1"}),
        (["--controller-host", "0.0.0.0"], "server", {"controller_address": "http://127.0.0.1:21001"}),
        (["--allow-credentials"], "server", {"allow_credentials": True}),
        (["--api-keys-file", "keys"], "server", {"api_keys_file": "keys"}),
        (["--controller-host", "h", "--controller-port", "1"], "worker", {"controller_address": "http://h:1"}),
        (["--model-path-address", "m@h@5"], "worker", {"host": "h", "port": 5, "worker_address": "http://h:5"}),
        (["--model-path-address", "m@::1@5"], "worker", {"host": "::1", "worker_address": "http://[::1]:5"}),
        (["--model-path-address", "m@[::1]@5"], "worker", {"host": "::1", "worker_address": "http://[::1]:5"}),
        (["--model-path-address", "m@::@5"], "worker", {"host": "::", "worker_address": None}),
        (["--model-path-address", "a/[b]@[::]@5?seed=1"], "worker", {"model_path": "a/[b]", "host": "::", "seed": 1}),
        (["--controller-host", "::"], "worker", {"controller_address": f"http://{LOOPBACK}:21001"}),
        (["--controller-host", ""], "server", {"controller_address": f"http://{LOOPBACK}:21001"}),
        (["--allowed-worker-networks", "10.0.0.0/8,local", "--no-worker-probe"], "controller",
         {"allowed_worker_networks": ("10.0.0.0/8", "local"), "no_worker_probe": True}),
        (["--allowed-origins", '["https://a.example"]'], "server", {"allowed_origins": ("https://a.example",)}),
        (["--controller-host", "::1"], "server", {"controller_address": "http://[::1]:21001"}),
        (["--server-host", "::"], "server", {"host": "::"}),
        (["--drain-timeout-s", "7"], "server", {"drain_timeout_s": 7.0}),
        (["--drain-timeout-s", "7"], "controller", {"drain_timeout_s": 7.0}),
        (["--drain-timeout-s", "7"], "worker", {"drain_timeout_s": 7.0}),
        (["--model-path-address", "m@0.0.0.0@5"], "worker", {"host": "0.0.0.0", "worker_address": None}),
        (["--model-path-address", "a/b@h@5"], "worker", {"model_path": "a/b"}),
        (["--worker-host", "y", "--worker-port", "9"], "worker", {"host": "localhost", "port": 20002}),
        (["--model-path", "x"], "worker", {"model_path": "fastserve-demo"}),
        (["--revision", "r"], "worker", {"revision": "r"}),
        (["--device", "mps"], "worker", {"device": "mps"}),
        (["--gpus", "0,2", "--num-gpus", "2"], "worker", {"gpus": "0,2", "num_gpus": 2}),
        (["--tensor-parallel-size", "4"], "worker", {"tp_size": 4}),
        (["--model-path-address", "m@h@1?tp-size=2&gpus=0,1"], "worker", {"tp_size": 2, "gpus": "0,1"}),
        (["--tp-size", "2", "--enable-expert-parallel"], "worker", {"tp_size": 2, "enable_expert_parallel": True}),
        (["--model-path-address", "m@h@1?tp-size=2&enable-expert-parallel=true"], "worker",
         {"tp_size": 2, "enable_expert_parallel": True}),
        (["--max-gpu-memory", "13GiB"], "worker", {"max_gpu_memory": "13GiB"}),
        (["--load-8bit", "--cpu-offloading"], "worker", {"load_8bit": True, "cpu_offloading": True}),
        (["--gptq-ckpt", "c", "--gptq-wbits", "4"], "worker", {"gptq_ckpt": "c", "gptq_wbits": 4}),
        (["--gptq-groupsize", "128", "--gptq-act-order"], "worker", {"gptq_groupsize": 128, "gptq_act_order": True}),
        (["--load-4bit", "--dummy"], "worker", {"load_4bit": True, "dummy": True}),
        (["--awq-ckpt", "c", "--awq-wbits", "4", "--awq-groupsize", "128"], "worker",
         {"awq_ckpt": "c", "awq_wbits": 4, "awq_groupsize": 128}),
        (["--model-names", "a,b"], "worker", {"model_names": ("a", "b")}),
        (["--limit-worker-concurrency", "7"], "worker", {"limit_worker_concurrency": 7}),
        (["--stream-interval", "7"], "worker", {"stream_interval": 7}),
        (["--no-register"], "worker", {"no_register": True}),
        (["--dtype", "bfloat16", "--seed", "3"], "worker", {"dtype": "bfloat16", "seed": 3}),
        (["--max-model-len", "512", "--max-total-tokens", "4096"], "worker",
         {"max_model_len": 512, "max_total_tokens": 4096}),
        (["--chat-template", "t.jinja", "--trust-remote-code"], "worker",
         {"chat_template": "t.jinja", "trust_remote_code": True}),
        (["--engine", "fake", "--no-prefix-cache"], "worker", {"engine": "fake", "no_prefix_cache": True}),
    ],
)  # fmt: skip
def test_flag_reaches_its_child(words: list[str], child: str, expected: dict[str, Any]) -> None:
    services = planned(*words)
    spec, config_class = {
        "controller": (services.controller, ControllerConfig),
        "worker": (services.workers[0], WorkerConfig),
        "server": (services.server, ApiServerConfig),
    }[child]
    config: Any = parse_config(config_class, arguments(spec), child, {})
    assert {name: getattr(config, name) for name in expected} == expected


def test_tls_is_for_every_service_and_in_every_address() -> None:
    services = planned("--tls-cert", "c.pem", "--tls-key", "k.pem")
    assert [spec.address.split(":")[0] for spec in services.services] == ["https"] * 3
    assert all({"--tls-cert=c.pem", "--tls-key=k.pem"} <= set(spec.argv) for spec in services.services)
    assert worker(services.workers[0]).controller_address == "https://localhost:21001"
    assert worker(services.workers[0]).worker_address == "https://localhost:20002"


@pytest.mark.parametrize("words", [[], ["--no-register"]])
def test_a_worker_gets_api_keys_only_where_it_serves_alone(words: list[str]) -> None:
    services = planned("--api-keys", "sk-one", *words)
    env = services.workers[0].env
    assert env.get("FASTSERVE_API_KEYS") == ("sk-one" if words else None)
    assert "sk-one" not in " ".join(services.workers[0].argv)


def test_off_and_unset_flags_emit_nothing() -> None:
    assert arguments(planned().controller) == ()
    assert arguments(planned().workers[0]) == (
        "--port=20002",
        "--max-gpu-memory=20GiB",
        "--worker-address=http://localhost:20002",
    )


def test_comma_lists_are_one_argument() -> None:
    argv = arguments(planned("--model-names", "a,b").workers[0])
    assert argv[argv.index("--model-names") + 1] == "a,b"


def test_keys_reach_the_api_server_alone_and_by_its_environment() -> None:
    services = planned("--api-keys", "sk-one,sk-two", environ={"FASTSERVE_API_KEYS": "sk-from-shell", "HOME": "/h"})
    assert services.server.env["FASTSERVE_API_KEYS"] == "sk-one,sk-two"
    assert not any("sk-" in word for spec in services.services for word in spec.argv)
    assert not any("FASTSERVE_API_KEYS" in spec.env for spec in (services.controller, *services.workers))
    assert services.controller.env["HOME"] == "/h"
    assert "sk-" not in repr(services)


def test_keys_from_the_environment() -> None:
    assert planned(environ={"FASTSERVE_API_KEYS": "k"}).server.env["FASTSERVE_API_KEYS"] == "k"


@pytest.mark.parametrize(
    ("words", "environ", "expected"),
    [
        ([], {}, None),
        ([], {"CUDA_VISIBLE_DEVICES": "2,3"}, "2,3"),
        (["--gpus", "1"], {"CUDA_VISIBLE_DEVICES": "2,3"}, "1"),
        (["--gpus", "1", "--model-path-address", "m@h@5?gpus=4,5"], {}, "4,5"),
    ],
)
def test_visible_devices(words: list[str], environ: dict[str, str], expected: str | None) -> None:
    services = planned(*words, environ=environ)
    assert services.workers[0].env.get("CUDA_VISIBLE_DEVICES") == expected
    assert services.controller.env.get("CUDA_VISIBLE_DEVICES") == environ.get("CUDA_VISIBLE_DEVICES")


def test_items_have_adapters_of_their_own() -> None:
    services = planned(
        *("--lora-modules", "all=/all", "--max-loras", "8", "--model-path-address"),
        "a@h@1?lora-modules=a=/x,b=/y&max-loras=4",
        "b@h@2",
        "c@h@3?lora-dirs=/d&lora-root=/r",
    )
    first, second, third = map(worker, services.workers)
    assert (first.lora_modules, first.max_loras) == (("a=/x", "b=/y"), 4)
    assert (second.lora_modules, second.max_loras) == (("all=/all",), 8)
    assert (third.lora_modules, third.lora_dirs, third.lora_root) == (("all=/all",), ("/d",), "/r")


def test_workers_with_adapters_keep_what_calls_have_loaded() -> None:
    services = planned("--model-path-address", "a@h@1", "b@h@2?enable-lora", "c@h@3?lora-root=/r&lora-state-file=/f")
    first, second, third = map(worker, services.workers)
    assert (first.lora_state_file, third.lora_state_file) == (None, "/f")
    assert second.lora_state_file == str(Path(services.workers[1].log).with_suffix(".adapters.json").absolute())
    assert services.state_files == (second.lora_state_file,), "a new launch begins without it"


@pytest.mark.parametrize("value", ["/x,y", "/x,,y", ",", "/a\\,b", "/a\\", "/%2C", "/one two,"])
def test_a_value_of_a_list_in_an_item_may_have_commas(value: str) -> None:
    """Every list, up to the command line of the worker."""
    written = quote(value, safe="")
    services = planned(
        "--model-path-address",
        f"a@h@1?lora-modules=a={written},b=/y&lora-dirs={written}&model-names={written},b&allowed-hosts={written},b",
    )
    first = worker(services.workers[0])
    assert (first.lora_modules, first.lora_dirs) == ((f"a={value}", "b=/y"), (value,))
    assert (first.model_names, first.allowed_hosts) == ((value, "b"), (value, "b"))


def test_items_have_options_of_their_own() -> None:
    services = planned(
        *("--dtype", "float16", "--load-8bit", "--model-names", "all", "--model-path-address"),
        "a@h@1?device=cuda&gpus=0,1&num-gpus=2&model-names=x,y&dtype=bfloat16",
        "b@h@2?load-8bit=false&trust-remote-code",
        "c@h@3",
    )
    first, second, third = map(worker, services.workers)
    assert (first.device, first.gpus, first.num_gpus) == ("cuda", "0,1", 2)
    assert (first.model_names, first.dtype, first.load_8bit) == (("x", "y"), "bfloat16", True)
    assert (second.load_8bit, second.trust_remote_code, second.dtype) == (False, True, "float16")
    assert (third.model_names, third.load_8bit) == (("all",), True)


def test_option_values_are_written_as_in_a_url() -> None:
    item = parse_item("m@h@1?chat-template=/a%20b/c%26d%40e.jinja&model-names=x%2fy,z&conv-template=plain+100%")
    assert item.options == {
        "chat_template": "/a b/c&d@e.jinja",
        "model_names": ("x/y", "z"),
        "conv_template": "plain+100%",
    }


@pytest.mark.parametrize(
    ("item", "model", "log"),
    [
        ("THUDM/chatglm2-6b@localhost@20002", "THUDM/chatglm2-6b", "worker_chatglm2_6b_localhost_20002.log"),
        ("C:\\models\\my-m@localhost@20002", "C:\\models\\my-m", "worker_my_m_localhost_20002.log"),
        ("/srv/my models/$(rm -r x); m@h@1", "/srv/my models/$(rm -r x); m", "worker_$(rm _r x); m_h_1.log"),
        ("/srv/a@b/m@h@1?seed=1", "/srv/a@b/m", "worker_m_h_1.log"),
        ("/srv/m?x&y@h@1", "/srv/m?x&y", "worker_m?x&y_h_1.log"),
        ("/srv/мои модели/模型 7b é@h@1?seed=1", "/srv/мои модели/模型 7b é", "worker_模型 7b é_h_1.log"),
    ],
)  # fmt: skip
def test_item_is_read_from_the_right(item: str, model: str, log: str) -> None:
    spec = planned("--model-path-address", item).workers[0]
    assert worker(spec).model_path == model
    assert Path(spec.log) == Path("logs") / log


def test_a_second_launch_in_a_folder_has_logs_of_its_own() -> None:
    config = parse("--server-port", "9999")
    services = plan(config, [parse_item("m@h@1")], {}, is_second=True)
    assert services.server.log == "logs/openai_api_server_9999.log"
    assert services.controller.log == "logs/controller_21001.log"
    assert services.workers[0].log == "logs/worker_m_h_1.log"


@pytest.mark.parametrize(("folder", "is_kept"), [("logs", False), ("logs/", False), ("elsewhere", True)])
def test_two_logs_of_a_service_are_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, is_kept: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    services = plan(parse(), [parse_item("m@h@1")], {"LOGDIR": folder}, log_dir=tmp_path / "logs")
    assert [("LOGDIR" in spec.env) for spec in services.services] == [is_kept] * 3


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("model", "an item has the form MODEL@HOST@PORT"),
        ("model@localhost", "an item has the form"),
        ("model@localhost@port", "an item has the form"),
        ("model@localhost@0", "an item has the form"),
        ("model@localhost@70000", "an item has the form"),
        ("@localhost@1", "an item has the form"),
        ("m@[::1@1", "an item has the form"),
        ("m@::1]@1", "an item has the form"),
        ("m@[]@1", "an item has the form"),
        ("m@h@\u0661", "an item has the form"),
        ("m@h@" + "1" * 5000, "an item has the form"),
        ("m@h@1?colour=red", "a worker has no option 'colour'"),
        ("m@h@1?port=5", "a worker has no option 'port'"),
        ("m@h@1?num-gpus=two", "num-gpus: 'two' is not a valid int."),
        ("m@h@1?device=gpu", "device: 'gpu' is not one of cpu, cuda"),
        ("m@h@1?load-8bit=maybe", "load-8bit: 'maybe' is neither true nor false."),
    ],
)
def test_bad_item_is_named(item: str, reason: str) -> None:
    with pytest.raises(StartupError) as caught:
        parse_item(item)
    assert repr(item) in caught.value.message
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0", "--num-gpus", "2"], "Larger --num-gpus (2) than --gpus 0!"),
        (["--model-path-address", "o/m@h@1?gpus=1,2&num-gpus=3"], "Larger --num-gpus (3) than --gpus 1,2!"),
        (["--model-path-address", "m@localhost@5001", "n@localhost@5001"],
         "Port 5001 is used twice: by --model-path-address m@localhost@5001 and by --model-path-address n@loc"),
        (["--model-path-address", "m@localhost@8888"],
         "Port 8888 is used twice: by --server-port and by --model-path-address m@localhost@8888."),
        (["--model-path-address", "m@localhost@21001"],
         "Port 21001 is used twice: by --controller-port and by --model-path-address m@localhost@21001."),
        (["--model-path-address", "./missing/model@localhost@5001"], "The model './missing/model' is missing"),
        (["--model-path-address", "/missing/model@localhost@5001"], "The model '/missing/model' is missing"),
        (["--model-path-address", "C:\\missing\\model@localhost@5001"], "is missing: there is no such file or folder"),
        (["--model-path-address", "a/b/c@localhost@5001"], "The model 'a/b/c' is missing"),
        (["--ssl"], "--ssl needs the environment variable SSL_CERTFILE"),
        (["--tls-cert", "c.pem"], "--tls-key is missing"),
        (["--tls-cert", "/missing/c.pem", "--tls-key", "/missing/k.pem"], "--tls-cert /missing/c.pem cannot be read"),
        (["--server-port", "0"], "--server-port 0: a port is a number from 1 to 65535."),
        (["--controller-port", "70000"], "--controller-port 70000: a port is a number from 1 to 65535."),
        (["--api-keys-file", "/missing/keys"], "--api-keys-file /missing/keys: there is no such file."),
        (["--api-keys", ""], "--api-keys (or FASTSERVE_API_KEYS) holds no key"),
        (["--api-keys", " , "], "--api-keys (or FASTSERVE_API_KEYS) holds no key"),
        (["--controller-host", "no.such.host.invalid"], "the host name no.such.host.invalid cannot be resolved"),
        (["--server-host", "a" * 300], "cannot be resolved"),
        (["--server-host", "a..b"], "cannot be resolved"),
        (["--server-host", "2001:db8::7"], "this machine has no address 2001:db8::7"),
        (["--server-host", "192.0.2.7"], "this machine has no address 192.0.2.7"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(words: list[str], message: str) -> None:
    config = parse(*words)
    with pytest.raises(StartupError) as caught:
        check(config, [parse_item(text) for text in config.model_path_address], [], Path("/nowhere"))
    assert message in caught.value.message


@pytest.mark.parametrize("kind", ["file.gguf", "file", "folder", "name"])
def test_whatever_the_path_holds_is_the_workers_business(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kind
    path.mkdir() if kind == "folder" else path.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    check_model(kind if kind == "name" else str(path))
    check_model("owner/a.model-name")


@dataclass(frozen=True)
class Bounded:
    """Settings with bounds."""

    title: ClassVar[str] = "service"
    max_body_bytes: int = limit(100, "largest body", minimum=10)
    mode: str = option("plain", "how it is done")
    other: str = option("plain", "what is not passed on")


@dataclass(frozen=True)
@pass_on(Bounded, names=["mode"])
class Passing:
    """Settings of a program that passes options on."""

    title: ClassVar[str] = "launcher"
    own: int = option(1, "its own")


def test_limits_and_named_options_of_a_service_are_passed_on() -> None:
    config: Any = parse_config(Passing, ["--max-body-bytes=20", "--mode=x"], "x", {})
    assert (config.max_body_bytes, config.mode, hasattr(config, "other")) == (20, "x", False)
    unset: Any = parse_config(Passing, [], "x", {"FASTSERVE_MAX_BODY_BYTES": "30"})
    assert (unset.max_body_bytes, unset.mode) == (None, "plain"), "services read their environment themselves"
    assert limits_of(Passing) == []
    with pytest.raises(SystemExit):
        parse_config(Passing, ["--max-body-bytes=5"], "x", {})


def test_the_launcher_passes_on_every_limit_of_every_service() -> None:
    known = {item.name for item in dataclasses.fields(LauncherConfig)}
    for config_class in (ControllerConfig, ApiServerConfig, WorkerConfig):
        assert {item.name for item in limits_of(config_class)} <= known


def test_a_variable_that_holds_no_key_is_refused_and_an_empty_one_is_as_good_as_none() -> None:
    with pytest.raises(StartupError, match="FASTSERVE_API_KEYS"):
        check(parse(environ={"FASTSERVE_API_KEYS": ","}), [], [], Path("/nowhere"))
    assert parse(environ={"FASTSERVE_API_KEYS": ""}).api_keys is None


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("--controller-h=x", "--controller-host=x"),
        ("--model-n", "--model-names"),
        ("--max", "--max-gpu-memory"),
        ("--lo", "--load-8bit"),
        ("--no", "--no-register"),
        ("--no-r", "--no-register"),
        ("--api-key", "--api-keys"),
        ("--dev", "--device"),
        ("--st=1", "--stream-interval=1"),
    ],
)
def test_classic_abbreviations_are_not_broken_by_newer_flags(short: str, full: str) -> None:
    assert expand_abbreviations(LauncherConfig, [short]) == [full]


def test_every_unique_prefix_of_the_classic_flags_stays_unique() -> None:
    classic = [flag_of(item) for item in dataclasses.fields(ClassicLauncherFlags)]
    known = {flag_of(item) for item in dataclasses.fields(LauncherConfig)}
    for flag in classic:
        prefixes = [flag[:length] for length in range(3, len(flag))]
        for prefix in prefixes:
            if prefix not in known and sum(other.startswith(prefix) for other in classic) == 1:
                assert expand_abbreviations(LauncherConfig, [prefix]) == [flag]


def test_full_flags_and_values_are_left_alone() -> None:
    words = ["--model-path", "--api-keys-file", "x", "--log-dir", "y", "--max-model-len=5", "-h", "--", "--c"]
    assert expand_abbreviations(LauncherConfig, words) == words
    assert build_parser(LauncherConfig, "x").parse_args(["--log-dir", "y"]).log_dir == "y"


@pytest.mark.parametrize(
    ("words", "front", "model", "has_key"),
    [
        ([], "http://localhost:8888", "fastserve-demo", False),
        (["--api-keys", "secret"], "http://localhost:8888", "fastserve-demo", True),
        (["--no-register"], "http://localhost:20002", "fastserve-demo", False),
        (["--model-path-address", "C:\\m\\it's\\@localhost@5"], "http://localhost:8888", "it's", False),
        (["--model-path-address", "m@localhost@5?no-register", "n@localhost@6"], "http://localhost:5", "m", False),
        (["--server-host", "::1"], "http://[::1]:8888", "fastserve-demo", False),
        (["--server-host", "::"], f"http://{LOOPBACK}:8888", "fastserve-demo", False),
    ],
)
def test_summary_shows_a_request_that_works(words: list[str], front: str, model: str, has_key: bool) -> None:
    config = parse(*words)
    items = [parse_item(text) for text in config.model_path_address]
    text = summary(config, items, plan(config, items, {}))
    assert shlex.quote(f"{front}/v1/chat/completions") in text, "brackets are special in some shells"
    assert model.replace("'", "'\"'\"'") in text
    assert ("Bearer YOUR_API_KEY" in text) is has_key
    assert "secret" not in text
    assert "python -m fastserve.shutdown" in text
