"""Updates of a model that is divided over two ranks: each is a member of the trainer's group."""

from __future__ import annotations

import queue
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file

from fastserve.engine.build import build_core, build_rank
from fastserve.engine.core import EngineCore
from fastserve.engine.follower import follow
from fastserve.engine.ranks.collectives import Collectives
from fastserve.engine.ranks.messages import EndRank, RankCommand
from fastserve.engine.ranks.thread_collectives import run_ranks
from fastserve.engine.sampling.order import LOGITS_PROCESSORS
from fastserve.engine.settings import EngineConfig
from fastserve.engine.weight_messages import FromDisk, FromGroup, GroupSettings
from fastserve.errors import InvalidRequestError
from tests.engine.conftest import CONFIGS, TinyModels

from .driver import PROMPTS, Serving, as_bytes, other_weights
from .test_groups import announced
from .trainer_process import Trainer, free_port


def check(serving: Serving, trainer: Trainer, new: Path, old: Path) -> None:
    fresh = {folder: Serving(folder) for folder in (new, old)}

    def is_like(folder: Path) -> None:
        assert serving.checksum() == fresh[folder].checksum()
        for prompt in PROMPTS:
            assert serving.ask(prompt).token_ids == fresh[folder].ask(prompt).token_ids

    is_like(old)
    port = free_port()
    trainer.begin("join", port=port, rank=0, world_size=3, name="ranks")
    settings = GroupSettings("ranks", "127.0.0.1", port, 1, 3, "gloo", 20.0, False)
    assert serving.wait(serving.core.updates.join(settings)).success
    trainer.answer()
    specs = announced(new)
    trainer.begin("broadcast", folder=str(new), names=[spec.name for spec in specs], name="ranks")
    assert serving.update(FromGroup("ranks", specs)).tensors == len(specs)
    trainer.answer()
    is_like(new)
    with pytest.raises(InvalidRequestError, match="no weight nothing"):
        serving.update(FromGroup("ranks", [*specs, msgspec.structs.replace(specs[0], name="nothing")]))
    trainer.begin("broadcast", folder=str(old), names=[spec.name for spec in specs], name="ranks")
    serving.update(FromGroup("ranks", specs))
    trainer.answer()
    is_like(old)
    serving.core.updates.leave("ranks")
    trainer.begin("leave", name="ranks")
    trainer.answer()
    serving.update(FromDisk(str(new)))
    is_like(new)
    stored = load_file(old / "model.safetensors")
    experts = [name for name in stored if ".experts." in name]
    if experts:
        with pytest.raises(InvalidRequestError, match="Only some of the experts"):
            serving.update(as_bytes({experts[0]: stored[experts[0]]}))
    serving.update(as_bytes(stored))
    is_like(old)


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_all_ranks_take_their_parts_together(
    tiny_models: TinyModels, tmp_path: Path, no_start_check: None, trainer: Trainer, name: str
) -> None:
    old = Path(tiny_models.path(name))
    new = other_weights(CONFIGS[name], tmp_path / "new")
    commands: queue.Queue[bytes] = queue.Queue()

    def run_rank(collectives: Collectives) -> None:
        def make(config: EngineConfig) -> EngineCore:
            return build_core(
                config, lambda *_: None, collectives=collectives,
                send_to_ranks=lambda command, rank=None: commands.put(msgspec.msgpack.encode(command)),
            )  # fmt: skip

        if collectives.rank == 1:
            config = EngineConfig(model_dir=str(old), device="cpu", dtype="float32", max_total_tokens=1024)
            model = build_rank(config, lambda *_: None, LOGITS_PROCESSORS, collectives)
            follow(collectives, model, lambda: msgspec.msgpack.decode(commands.get(timeout=20), type=RankCommand))
            return
        try:
            check(Serving(old, make=make), trainer, new, old)
        finally:
            commands.put(msgspec.msgpack.encode(EndRank()))

    run_ranks(2, run_rank)
