"""A device is one file: what it leaves out is done by torch, and its name is all that the rest of the engine knows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastserve.engine import devices
from fastserve.engine.devices.device import Device
from fastserve.engine.devices.find import device_of, find_device
from fastserve.engine.runner.runner import ModelRunner
from fastserve.errors import StartupError

from .conftest import TinyModels
from .test_engine_equality import EOS, Answer, greedy, make_core, run

BARE = '''
"""A processor that has nothing of its own."""

from fastserve.engine.devices.device import Device
from fastserve.engine.memory import FreeMemory


class BareDevice(Device):
    def free_memory(self) -> FreeMemory:
        return FreeMemory(1 << 30, "on the bare device")


DEVICE = BareDevice
'''


@pytest.fixture
def bare_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Device]]:
    """In the place of the device for CPUs stands one that has what any device has."""
    (tmp_path / "cpu.py").write_text(BARE)
    monkeypatch.setattr(devices, "__path__", [str(tmp_path), *devices.__path__])
    monkeypatch.delitem(sys.modules, "fastserve.engine.devices.cpu")
    device_of.cache_clear()
    yield type(device_of(torch.device("cpu")))
    sys.modules.pop("fastserve.engine.devices.cpu")
    device_of.cache_clear()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_an_engine_on_a_device_of_one_file_equals_generate(
    tiny_models: TinyModels, bare_device: type[Device], name: str
) -> None:
    assert bare_device.__name__ == "BareDevice"
    path = tiny_models.path(name)
    core = make_core(path)
    runner = core._executor
    assert isinstance(runner, ModelRunner)
    assert [way.name for way in runner.forward_passes.ways] == ["modules"]
    prompts = {"short": [5], "long": list(range(2, 50)), "middle": [7, 8, 9, 10]}
    answers = {key: Answer() for key in prompts}
    for key, prompt in prompts.items():
        core.add(greedy(prompt, 8, key))
    run(core, answers)
    for key, prompt in prompts.items():
        assert answers[key].token_ids == tiny_models.reference(path, prompt, 8, [EOS])


@pytest.mark.parametrize("name", ["npu", "lazy", "device", "find", "../cpu", ""])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(StartupError, match=r"this machine or this build of torch has no such device; try --device cpu"):
        find_device(name)
