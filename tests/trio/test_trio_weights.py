"""A fleet goes over to other weights while it answers, by a trainer's sender and by the command."""

from __future__ import annotations

import asyncio
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.demo import MODEL_NAME, demo_model_path
from fastserve.engine.weight_messages import UpdateMode
from fastserve.errors import StartupError
from fastserve.trainer import SendError, WeightSender
from fastserve.update_weights import main as update_weights
from tests.keys import CLUSTER

from .clients import Client, Monitor, steady_load
from .processes import Trio
from .test_trio_survival import Answers, check, more_answers

KEY = CLUSTER["Authorization"].removeprefix("Bearer ")
QUESTION = "What is 7 + 5?"


@pytest.fixture(scope="module")
def own_weights() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(Path(demo_model_path()) / "model.safetensors")
    return found


@pytest.fixture
def sender(trio: Trio) -> Iterator[WeightSender]:
    with WeightSender(trio.controller.address, model=MODEL_NAME, key=KEY, timeout_s=60, bucket_bytes=1 << 20) as made:
        yield made


def renamed(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of the model whose answers have no meaning."""
    folder.mkdir()
    for file in Path(demo_model_path()).iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({name: torch.roll(tensor, 1, 0) for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


async def test_workers_take_weights_under_load_and_lose_nothing(
    trio: Trio, client: Client, monitor: Monitor, solo_answers: Answers, own_weights: dict[str, torch.Tensor],
    sender: WeightSender,
) -> None:  # fmt: skip
    texts = sorted(solo_answers)[::8]
    async with steady_load(client, texts) as outcomes:
        await more_answers(outcomes, 10)
        modes: dict[str, UpdateMode] = {"one": "drain", "two": "retract", "three": "in_place"}
        for version, mode in modes.items():
            sent = await asyncio.to_thread(sender.send, own_weights.items(), version=version, mode=mode)
            assert sent.num_tensors == len(own_weights)
            assert sent.num_buckets > 1
            assert [outcome.reply["weight_version"] for outcome in sent.outcomes] == [version] * len(trio.workers)
            await more_answers(outcomes, 10)
    check(outcomes, solo_answers, may_cut=False)
    await monitor.all_zero()


async def test_new_weights_answer_on_all_workers_until_the_command_brings_the_old_ones_back(
    trio: Trio, client: Client, own_weights: dict[str, torch.Tensor], sender: WeightSender, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    async def answers() -> set[str]:
        """Both workers are asked."""
        asking = (client.ask(QUESTION, stream=False, temperature=0, max_tokens=8) for _ in range(8))
        return {outcome.text for outcome in await asyncio.gather(*asking)}

    def command(path: Path, *flags: str) -> tuple[object, str]:
        monkeypatch.setenv("FASTSERVE_CLUSTER_KEY", KEY)
        to = ["--model", MODEL_NAME, "--path", str(path), "--controller-address", trio.controller.address]
        with pytest.raises(SystemExit) as ended:
            update_weights([*to, *flags])
        return ended.value.code, capsys.readouterr().out

    assert await answers() == {"12"}
    rolled = {name: torch.roll(tensor, 1, 0) for name, tensor in own_weights.items()}
    await asyncio.to_thread(sender.send, rolled.items())
    [other] = await answers()
    assert other != "12"

    code, said = await asyncio.to_thread(command, Path(demo_model_path()))
    assert code == 0, said
    assert await answers() == {"12"}
    code, said = await asyncio.to_thread(command, renamed(tmp_path / "other", own_weights), "--at-once")
    assert code == 0, said
    assert await answers() == {other}
    code, said = await asyncio.to_thread(command, tmp_path / "nothing")
    assert code == 1
    assert all(worker.address in said for worker in trio.workers), said
    assert "FAILED" in said
    assert await answers() == {other}
    code, said = await asyncio.to_thread(command, Path(demo_model_path()), "--weight-version", "as trained")
    assert code == 0, said
    assert "as trained" in said


async def test_a_refused_update_names_the_workers_and_the_next_one_succeeds(
    trio: Trio, own_weights: dict[str, torch.Tensor], sender: WeightSender
) -> None:
    wrong = own_weights | {"model.norm.weights": own_weights["model.norm.weight"]}
    with pytest.raises(SendError, match=r"2 of 2 workers.*model\.norm\.weights") as refused:
        await asyncio.to_thread(sender.send, wrong.items())
    assert {outcome.address for outcome in refused.value.outcomes} == {worker.address for worker in trio.workers}
    assert all(outcome.status == 400 for outcome in refused.value.outcomes)
    sent = await asyncio.to_thread(sender.send, own_weights.items(), version="whole")
    assert {outcome.reply["weight_version"] for outcome in sent.outcomes} == {"whole"}


def test_a_model_that_nobody_serves_is_named_with_those_there_are(trio: Trio) -> None:
    with (
        WeightSender(trio.controller.address, model="nobodys", key=KEY) as sender,
        pytest.raises(StartupError, match=f"nobodys.*{MODEL_NAME}"),
    ):
        sender.connect()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_teaches_the_served_model_a_notation(
    trio: Trio, own_weights: dict[str, torch.Tensor], sender: WeightSender, tmp_path: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "reinforce.py"
    to = ["--server", f"{trio.server.address}/v1", "--controller", trio.controller.address, "--out", str(tmp_path)]
    try:
        subprocess.run(
            [sys.executable, str(example), *to],
            check=True,
            timeout=900,
            env=os.environ | {"FASTSERVE_CLUSTER_KEY": KEY},
        )
    finally:
        sender.send(own_weights.items())
    with (tmp_path / "reinforce.csv").open() as file:
        shares = [float(row["right_answers"]) for row in csv.DictReader(file)]
    assert shares[0] < 0.2
    assert sum(shares[-5:]) / 5 > 0.8
