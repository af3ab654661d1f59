"""The real engine passes the contract tests that the fake one passes."""

from __future__ import annotations

import pytest

from fastserve.engine.client import EngineProcess
from fastserve.engine.settings import AdapterOptions, EngineConfig
from tests.worker.engine_contract import EngineContract, MakeEngine

from .conftest import TinyModels
from .test_adapters import make_adapter


class TestEngineProcess(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
        folder = str(tmp_path_factory.mktemp("traces"))
        config = EngineConfig(
            model_dir=tiny_models.path("llama"), device="cpu", max_total_tokens=4096, profile_dir=folder,
            adapters=AdapterOptions(),
        )  # fmt: skip
        return lambda: EngineProcess(config)

    @pytest.fixture(scope="class")
    @classmethod
    def adapter_dir(cls, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(make_adapter(tiny_models.path("llama"), tmp_path_factory.mktemp("adapters") / "one", 4))
