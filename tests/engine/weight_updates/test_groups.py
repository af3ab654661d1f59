"""Updates over a trainer's process group, with a trainer that has nothing of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastserve.engine.weight_messages import FromGroup, GroupSettings, GroupState, TensorSpec
from fastserve.errors import (
    ConflictError,
    EngineTimeoutError,
    InvalidRequestError,
    WeightGroupNotFoundError,
    WeightTransferError,
)
from tests.engine.conftest import CONFIGS, TinyModels

from .driver import Serving, other_weights, same_answers
from .trainer_process import Trainer, free_port


def settings(port: int, name: str, *, rank: int = 1, timeout_s: float = 10.0, warm_up: bool = False) -> GroupSettings:
    return GroupSettings(name, "127.0.0.1", port, rank, 2, "gloo", timeout_s, warm_up)


@pytest.fixture(scope="module")
def serving(tiny_models: TinyModels) -> Serving:
    return Serving(tiny_models.path("llama"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_weights(CONFIGS["llama"], tmp_path_factory.mktemp("new") / "llama")


def join(serving: Serving, trainer: Trainer, name: str, *, rank: int = 1, **options: Any) -> GroupState:
    port = free_port()
    if rank == 0:  # this engine has the store, so it is there first
        joined = serving.core.updates.join(settings(port, name, rank=rank, **options))
        trainer.begin("join", port=port, rank=1, world_size=2, name=name)
    else:
        trainer.begin("join", port=port, rank=0, world_size=2, name=name)
        joined = serving.core.updates.join(settings(port, name, rank=rank, **options))
    if options.get("warm_up"):
        trainer.begin("sum", name=name)
        trainer.answer()
    state = serving.wait(joined)
    trainer.answer()
    return state


def announced(folder: Path, names: list[str] | None = None, prefix: str = "") -> list[TensorSpec]:
    stored = load_file(folder / "model.safetensors")
    return [
        TensorSpec(name, prefix + str(stored[name].dtype).removeprefix("torch."), tuple(stored[name].shape))
        for name in names or stored
    ]


@pytest.mark.parametrize("rank", [1, 0])
def test_a_trainer_that_knows_nothing_of_this_engine_sends_all_weights(
    serving: Serving, trainer: Trainer, new: Path, tiny_models: TinyModels, rank: int
) -> None:
    """Trainers are the first rank of the group, or the last."""
    name = f"rank {rank}"
    state = join(serving, trainer, name, rank=rank, warm_up=rank == 1)
    assert (state.first_s > 0) == (rank == 1)
    for folder in (new, Path(tiny_models.path("llama"))):
        specs = announced(folder, prefix="torch." if rank else "")
        trainer.begin("broadcast", folder=str(folder), names=[spec.name for spec in specs], name=name, root=1 - rank)
        running = serving.add([5, 6], max_tokens=20)
        reply = serving.update(FromGroup(name, specs, 1 - rank), version=folder.name)
        trainer.answer()
        assert serving.run(running).finish_reason == "length"
        assert (reply.tensors, reply.buckets, reply.weight_version) == (len(specs), len(specs), folder.name)
        assert reply.num_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
        assert 0 < reply.first_s <= reply.transfer_s <= reply.total_s
        assert reply.gb_per_s > 0
        fresh = Serving(folder)
        assert serving.checksum() == fresh.checksum()
        assert same_answers(serving.answer_all(), fresh.answer_all())
    trainer.begin("leave", name=name)
    serving.core.updates.leave(name)
    trainer.answer()
    with pytest.raises(WeightGroupNotFoundError, match="no group rank"):
        serving.update(FromGroup(name, specs))


def test_a_bucket_is_one_collective(serving: Serving, trainer: Trainer, new: Path, tiny_models: TinyModels) -> None:
    join(serving, trainer, "buckets")
    for folder, max_bytes in ((new, 1 << 30), (Path(tiny_models.path("llama")), 40_000)):
        specs = announced(folder)
        sizes = [tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()]
        buckets, room = [0], max_bytes
        for size in sizes:
            if size > room and buckets[-1]:
                buckets.append(0)
                room = max_bytes
            buckets[-1] += 1
            room -= size
        names = [spec.name for spec in specs]
        trainer.begin("bucket", folder=str(folder), names=names, buckets=buckets, name="buckets")
        reply = serving.update(FromGroup("buckets", specs, bucket_bytes=max_bytes))
        trainer.answer()
        assert reply.buckets == len(buckets)
        assert (len(buckets) == 1) == (folder == new)
        assert serving.checksum() == Serving(folder).checksum()
    serving.core.updates.leave("buckets")


def test_what_is_announced_is_checked_before_the_first_byte(serving: Serving, trainer: Trainer, new: Path) -> None:
    join(serving, trainer, "checked")
    before = serving.checksum()
    good = announced(new)
    for spec, words in (
        (TensorSpec("nothing", "float32", (3,)), "no weight nothing"),
        (TensorSpec(good[0].name, "float16", good[0].shape), "is float32 in this engine, not float16"),
        (TensorSpec(good[0].name, "float33", good[0].shape), "no dtype float33"),
        (TensorSpec(good[0].name, "float32", (3,)), r"not \(3,\)"),
        (good[1], "named twice"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            serving.update(FromGroup("checked", [spec, *good[1:]]))
    for root in (1, 2):
        with pytest.raises(InvalidRequestError, match="is not the rank of another member"):
            serving.update(FromGroup("checked", good, root))
    assert serving.checksum() == before
    # Nothing was received, so the trainer's first broadcast is still the next one.
    trainer.begin("broadcast", folder=str(new), names=[spec.name for spec in good], name="checked")
    serving.update(FromGroup("checked", good))
    trainer.answer()
    assert serving.checksum() == Serving(new).checksum()
    serving.core.updates.leave("checked")


def test_several_groups_exist_at_once_and_a_name_is_taken_once(serving: Serving, trainer: Trainer, new: Path) -> None:
    for name in ("one", "two"):
        join(serving, trainer, name)
    with pytest.raises(ConflictError, match="a group one already"):
        serving.core.updates.join(settings(free_port(), "one"))
    for name in ("two", "one", "two"):
        trainer.begin("broadcast", folder=str(new), names=["model.norm.weight"], name=name)
        assert serving.update(FromGroup(name, announced(new, ["model.norm.weight"]))).tensors == 1
        trainer.answer()
    for name in ("one", "two"):
        serving.core.updates.leave(name)
        join(serving, trainer, name + " again")
        serving.core.updates.leave(name + " again")


def test_a_trainer_that_does_not_come_costs_a_time_out_while_requests_are_served(serving: Serving) -> None:
    joining = serving.core.updates.join(settings(free_port(), "alone", timeout_s=1.0))
    assert serving.ask([3, 4]).finish_reason == "length"
    assert not joining.done()
    with pytest.raises(EngineTimeoutError, match=r"did not form at 127\.0\.0\.1"):
        serving.wait(joining)
    with pytest.raises(WeightGroupNotFoundError):
        serving.core.updates.leave("alone")


@pytest.mark.parametrize("end", ["leave", pytest.param("die", marks=pytest.mark.slow)])
def test_a_trainer_that_goes_away_halfway_changes_nothing_and_another_can_come(
    serving: Serving, trainer: Trainer, new: Path, end: str
) -> None:
    before, version = serving.checksum(), serving.core.stats.weight_version
    dying = trainer if end == "leave" else Trainer()
    try:
        join(serving, dying, "mortal")
        specs = announced(new)
        names = [spec.name for spec in specs]
        dying.begin("broadcast", folder=str(new), names=names, name="mortal", only=len(names) // 2)
        update = serving.receive(FromGroup("mortal", specs))
        dying.answer()
        assert serving.ask([3, 4]).finish_reason == "length"
        with pytest.raises(ConflictError, match="in progress"):
            serving.receive(FromGroup("mortal", specs))
        dying.begin(end, name="mortal")
        with pytest.raises(WeightTransferError, match="another member died"):
            serving.wait(update)
    finally:
        if end == "die":
            dying.end()
        else:
            dying.answer()
    assert (serving.checksum(), serving.core.stats.weight_version) == (before, version)
    with pytest.raises(WeightGroupNotFoundError):
        serving.receive(FromGroup("mortal", specs))
    join(serving, trainer, "mortal")
    trainer.begin("broadcast", folder=str(new), names=["model.norm.weight"], name="mortal")
    assert serving.update(FromGroup("mortal", announced(new, ["model.norm.weight"]))).success
    trainer.answer()
    serving.core.updates.leave("mortal")
    trainer.begin("leave", name="mortal")
    trainer.answer()


def test_an_address_that_cannot_be_is_named(serving: Serving) -> None:
    nowhere = GroupSettings("g", "no.such.host.invalid", 1, 1, 2, "gloo", 5.0, False)
    with pytest.raises(InvalidRequestError, match=r"no\.such\.host"):
        serving.wait(serving.core.updates.join(nowhere))
    nccl = GroupSettings("g", "127.0.0.1", 1, 1, 2, "nccl", 5.0, False)
    with pytest.raises(InvalidRequestError, match="give gloo"):
        serving.wait(serving.core.updates.join(nccl))
