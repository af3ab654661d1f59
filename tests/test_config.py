"""Settings: flags over environment over defaults, and back to a command line."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.config import ApiServerConfig, ControllerConfig, LauncherConfig, WorkerConfig
from fastserve.errors import StartupError
from fastserve.options import build_parser, comma_join, comma_list, limit, limits_of, parse_config, to_argv

KEYS = {"FASTSERVE_API_KEYS": "hush-1,hush-2"}


def test_flags_go_over_the_environment_over_defaults() -> None:
    assert parse_config(ApiServerConfig, [], "x", {}).api_keys is None
    assert parse_config(ApiServerConfig, [], "x", KEYS).api_keys == ("hush-1", "hush-2")
    assert parse_config(ApiServerConfig, ["--api-keys", "flag"], "x", KEYS).api_keys == ("flag",)


@given(st.lists(st.text(alphabet="a\\, ", min_size=1).filter(lambda value: value == value.strip())))
def test_a_comma_list_holds_any_values(values: list[str]) -> None:
    assert comma_list(comma_join(values)) == tuple(values)


def test_help_shows_no_secret_from_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(ApiServerConfig, ["--help"], "x", KEYS)
    shown = capsys.readouterr().out
    assert "--api-keys" in shown
    assert "hush" not in shown


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        ("launcher", ["workers", "controller", "launcher", "API server", "every service"]),
        ("controller", ["listening and logs", "controller"]),
        ("model_worker", ["listening and logs", "model", "engine", "worker"]),
        ("openai_api_server", ["listening and logs", "API server"]),
        ("shutdown", ["shutdown"]),
    ],
)
def test_help_is_grouped_and_fits_a_terminal(module: str, groups: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"fastserve.{module}", "--help"],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    shown = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")][1:]
    assert [title for title in shown if title in groups] == groups
    assert "options" not in shown, "a settings class without a title"
    assert max(map(len, lines)) <= 80 or "{" in max(lines, key=len), "only a list of choices may be longer"
    assert "None)" not in result.stdout
    assert not re.search(r"\| (torch|transformers)$", result.stderr, re.MULTILINE)


def test_an_option_that_is_on_by_default_can_be_switched_off() -> None:
    assert parse_config(LauncherConfig, [], "x", {}).restart is True
    config = parse_config(LauncherConfig, ["--no-restart"], "x", {})
    assert config.restart is False
    assert to_argv(config) == ["--no-restart"]


@pytest.mark.parametrize("flag", ["--tp-size", "--tensor-parallel-size"])
def test_an_option_can_have_a_second_name(flag: str) -> None:
    classes: tuple[type[WorkerConfig | LauncherConfig], ...] = (WorkerConfig, LauncherConfig)
    for config_class in classes:
        config = parse_config(config_class, [flag, "2"], "prog", {})
        assert config.tp_size == 2
        assert to_argv(config) == ["--tp-size=2"]


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(StartupError, match="FASTCHAT_WORKER_HEART_BEAT_INTERVAL"):
        parse_config(WorkerConfig, [], "x", {"FASTCHAT_WORKER_HEART_BEAT_INTERVAL": "soon"})


@pytest.mark.parametrize(
    "argv",
    [
        ["--controller", "http://c:1", "--model-name", "a,b", "--worker", "http://w:2"],  # FastChat's abbreviations
        ["--model-path", "C:\\my models\\m; rm -rf $(x)", "--gpus", "0,2", "--num-gpus", "2"],
        ["--load-8bit", "--no-register", "--seed", "-1", "--dtype", "bfloat16"],
    ],
)
def test_to_argv_is_read_back_as_the_same(argv: list[str]) -> None:
    config = parse_config(WorkerConfig, argv, "x", {})
    assert config != WorkerConfig()
    assert parse_config(WorkerConfig, to_argv(config), "x", {}) == config


def test_json_lists_and_secrets() -> None:
    argv = ["--allowed-origins", '["http://a", "http://b,c"]', "--api-keys", "k1,k2", "--allow-credentials"]
    config = parse_config(ApiServerConfig, argv, "x", {})
    assert config.allowed_origins == ("http://a", "http://b,c")
    assert parse_config(ApiServerConfig, to_argv(config), "x", {}) == config
    line = to_argv(dataclasses.replace(config, api_keys=None))
    assert not any("k1" in part for part in line)
    assert parse_config(ApiServerConfig, line, "x", {"FASTSERVE_API_KEYS": "k1,k2"}) == config


@pytest.mark.parametrize(
    ("config_class", "short", "field"),
    [
        (ApiServerConfig, "--api-key", "api_keys"),
        (WorkerConfig, "--gpu", "gpus"),
        (WorkerConfig, "--max", "max_gpu_memory"),
        (WorkerConfig, "--lim", "limit_worker_concurrency"),
    ],
)
def test_flags_that_we_added_break_no_old_abbreviation(config_class: type[object], short: str, field: str) -> None:
    config = parse_config(config_class, [short, "3"], "x", {})
    assert getattr(config, field) in ("3", 3, ("3",))


@dataclass(frozen=True)
class _Limited:
    """Settings with bounds."""

    max_body_bytes: int = limit(100, "largest body")
    idle_s: float = limit(5.0, "longest idle time", minimum=0.5)


def test_a_limit_is_read_from_its_flag_over_its_environment_variable() -> None:
    environ = {"FASTSERVE_MAX_BODY_BYTES": "7", "FASTSERVE_IDLE_S": "2"}
    assert parse_config(_Limited, ["--idle-s=3"], "test", environ) == _Limited(max_body_bytes=7, idle_s=3.0)
    assert [item.name for item in limits_of(_Limited)] == ["max_body_bytes", "idle_s"]


@pytest.mark.parametrize("text", ["0.4", "-1"])
def test_a_limit_below_its_minimum_is_refused_with_its_name_and_the_minimum(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(_Limited, [f"--idle-s={text}"], "test", {})
    assert "--idle-s" in (message := capsys.readouterr().err)
    assert "minimum of 0.5" in message
    with pytest.raises(StartupError, match=r"FASTSERVE_IDLE_S.*minimum of 0\.5"):
        parse_config(_Limited, [], "test", {"FASTSERVE_IDLE_S": text})


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--drain-timeout-s=nan"], "--drain-timeout-s: nan is not a finite number"),
        (["--keep-alive-timeout-s=inf"], "--keep-alive-timeout-s: inf is not a finite number"),
        (["--gpu-memory-utilization=nan"], "--gpu-memory-utilization: nan is not a finite number"),
        (["--heartbeat-interval-s=1e9"], "--heartbeat-interval-s: 1e+09 is more than the maximum of 3600"),
        (["--port=65536"], "--port: 65536 is more than the maximum of 65535"),
        (["--port=-1"], "--port: -1 is less than the minimum of 0"),
    ],
)
def test_numbers_that_no_service_can_work_with_are_refused(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(WorkerConfig, words, "test", {})
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("config_class", [ControllerConfig, ApiServerConfig, WorkerConfig, LauncherConfig])
def test_help_speaks_of_values_as_they_are_typed(config_class: type[Any]) -> None:
    text = build_parser(config_class, "x").format_help()
    assert not re.search(r"default: [('\"]", " ".join(text.split()))
