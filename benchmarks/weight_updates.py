"""What live weight updates cost: `python -m benchmarks.weight_updates [--model FOLDER] [fixed transfer pause]`.

- fixed: 300 tensors of 1 kB, in one call and in a call for each, to a worker of a model that has hardly more.
- transfer: all weights of a model of the shape of Llama 3.2 1B (random ones, bfloat16), compared with broadcasts of
  the same buckets between two processes that do nothing else, in turns.
- pause: all weights of `--model` while 8 clients stream: the longest gap between two chunks of a stream, with an update
  and without one.

The trainer is this process; gloo over loopback. Figures are medians over the rounds. Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks.compare import MODEL, Arm, free_port, our_worker, serving
from fastserve.access.cluster_client import ClusterClient
from fastserve.demo import demo_model_path
from fastserve.engine.weight_messages import GroupSettings
from fastserve.engine.weight_updates.buckets import split_into_buckets
from fastserve.engine.weight_updates.group import Broadcast, WeightGroup
from fastserve.trainer import Sent, WeightSender
from fastserve.trainer.sender import BUCKET_BYTES

PARTS = ("fixed", "transfer", "pause")
NUM_TINY = 300
ONE_BILLION = LlamaConfig(
    hidden_size=2048,
    num_hidden_layers=16,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
TINY = LlamaConfig(
    hidden_size=16,
    num_hidden_layers=43,
    intermediate_size=16,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=2048,
    max_position_embeddings=512,
)
NUM_CLIENTS = 8
STREAM_TOKENS = 400


def write_folder(config: LlamaConfig, folder: Path) -> Path:
    """A model without weights: workers with --dummy make them."""
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(demo_model_path()) / name, folder / name)
    return folder


def random_weights(folder: str | Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values that no model computes with, quick to make; one after the other in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    parameters = dict(model.named_parameters())
    flat = torch.full((sum(tensor.numel() for tensor in parameters.values()),), 0.01, dtype=dtype)
    parts = flat.split([tensor.numel() for tensor in parameters.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(parameters.items(), parts, strict=True)}


def worker(folder: str | Path, dtype: str, *flags: str) -> Arm:
    args = argparse.Namespace(model=str(folder), dtype=dtype, ours=list(flags))
    return Arm("fastserve", *our_worker(args, "off"))


def address(arm: Arm) -> str:
    return f"http://127.0.0.1:{arm.port}"


# ---- fixed cost -------------------------------------------------------------------------------------------------


def measure_fixed(rounds: int, folder: Path) -> None:
    arm = worker(write_folder(TINY, folder / "tiny"), "float32", "--dummy", "--max-model-len", "256")
    tensors = [item for item in random_weights(folder / "tiny", torch.float32).items() if item[1].numel() == 256]
    tensors = tensors[:NUM_TINY]
    with serving(arm), WeightSender(address(arm)) as sender:
        sender.send(tensors)
        whole = [sender.send(tensors).total_s for _ in range(5 * rounds)]
        single = [sender.send([item]).total_s for _ in range(rounds) for item in tensors]
    print(f"| {len(tensors)} tensors of 1 kB in one call | {statistics.median(whole) * 1000:.1f} ms |")
    print(f"| one of them in a call | {statistics.median(single) * 1000:.2f} ms |")


# ---- transfer ---------------------------------------------------------------------------------------------------


class Bare:
    """A process that receives the same buckets and does nothing with them."""

    def __init__(self) -> None:
        port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.weight_updates", "--receive-at", str(port)], stdin=subprocess.PIPE
        )
        self._group = WeightGroup.connect(bare_settings(port, 0), 0, torch.device("cpu"))
        self._group.warm_up()

    def send(self, tensors: list[torch.Tensor]) -> float:
        """Seconds until the last bucket has been received. Buckets are sent from where the tensors lie."""
        buckets = split_into_buckets(tensors, lambda tensor: tensor.nbytes, BUCKET_BYTES)
        sizes = [sum(tensor.nbytes for tensor in bucket) for bucket in buckets]
        flat = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage())
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(sizes).encode() + b"\n")
        self._process.stdin.flush()
        return broadcast_all(self._group, flat.split(sizes))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._group.close()


def bare_settings(port: int, rank: int) -> GroupSettings:
    return GroupSettings("bare", "127.0.0.1", port, rank, 2, "gloo", 60.0, warm_up=True)


def receive_bare(port: int) -> None:
    group = WeightGroup.connect(bare_settings(port, 1), 0, torch.device("cpu"))
    group.warm_up()
    for line in sys.stdin:
        sizes = json.loads(line)
        buffers = [torch.ones(max(sizes), dtype=torch.uint8) for _ in range(2)]
        broadcast_all(group, [buffers[number % 2][:size] for number, size in enumerate(sizes)])
    group.close()


def broadcast_all(group: WeightGroup, buckets: Sequence[torch.Tensor]) -> float:
    """Broadcast from rank 0, two buckets at a time; return the seconds until all members have them."""
    in_flight: deque[Broadcast] = deque()
    group.warm_up()
    begin = time.perf_counter()
    for bucket in buckets:
        if len(in_flight) == 2:
            in_flight.popleft().wait()
        in_flight.append(group.broadcast(bucket, 0))
    for broadcast in in_flight:
        broadcast.wait()
    group.warm_up()
    return time.perf_counter() - begin


def measure_transfer(rounds: int, folder: Path, ranks: int) -> None:
    where = write_folder(ONE_BILLION, folder / "1b")
    weights = random_weights(where, torch.bfloat16)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    arm = worker(where, "bfloat16", "--dummy", "--max-model-len", "2048", "--tp-size", str(ranks))
    bare_s, sent = [], []
    with serving(arm), WeightSender(address(arm)) as sender:
        bare = Bare()
        try:
            for round_number in range(rounds + 1):
                seconds, update = bare.send(list(weights.values())), sender.send(weights.items())
                if round_number:  # the first one is the warm-up
                    bare_s.append(seconds)
                    sent.append(update)
                    print(f"bare {seconds:.2f} s, update {update.total_s:.2f} s, {reply(update)}", file=sys.stderr)
        finally:
            bare.close()
        with ClusterClient(address(arm)) as client:
            checksum = client.call(address(arm), "/weights_checker", {"action": "checksum"}, 300.0).reply["checksum"]
    alone_s = statistics.median(bare_s)
    transfer_s = statistics.median(float(reply(update)["transfer_s"]) for update in sent)
    load_s = statistics.median(float(reply(update)["load_s"]) for update in sent)
    total_s = statistics.median(update.total_s for update in sent)
    print(f"| {num_bytes / 1e9:.2f} GB to {ranks} rank(s): bare broadcast | {alone_s:.2f} s |")
    print(f"| transfer during the update | {transfer_s:.2f} s, {alone_s / transfer_s:.2f} of the bare rate |")
    print(f"| packing | {load_s:.2f} s |")
    print(f"| whole update | {total_s:.2f} s, {total_s / max(alone_s, load_s):.2f} x the slower one |")
    print(f"| checksum afterwards | {checksum} |")


def reply(update: Sent) -> dict[str, Any]:
    return update.outcomes[0].reply


# ---- pause ------------------------------------------------------------------------------------------------------


async def longest_gap(session: aiohttp.ClientSession, url: str, number: int) -> float:
    """The longest time between two chunks of one stream."""
    body = {
        "model": MODEL,
        "prompt": f"{number} " * 16,
        "max_tokens": STREAM_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }
    longest, last = 0.0, None
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if line.startswith(b'data: {"error"'):
                raise RuntimeError(line.decode())
            now = time.perf_counter()
            longest, last = max(longest, 0.0 if last is None else now - last), now
    return longest


async def stream_all(url: str, sender: WeightSender | None, weights: dict[str, torch.Tensor], mode: str) -> float:
    """The longest gap of 8 streams; with a sender, the weights are replaced in their midst."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        streams = [asyncio.create_task(longest_gap(session, url, number)) for number in range(NUM_CLIENTS)]
        if sender is not None:
            await asyncio.sleep(2.0)  # all of them decode
            sent = await asyncio.to_thread(sender.send, weights.items(), mode=mode)  # type: ignore[arg-type]
            if any(stream.done() for stream in streams):
                raise RuntimeError("the update came after the end of a stream")
            print(f"update in {sent.total_s:.2f} s, {reply(sent)}", file=sys.stderr)
        return max(await asyncio.gather(*streams))


def measure_pause(rounds: int, model: str) -> None:
    arm = worker(model, "bfloat16")
    weights = random_weights(model, torch.bfloat16)
    for mode in ("in_place", "retract"):
        usual, updated = [], []
        with serving(arm), WeightSender(address(arm)) as sender:
            sender.connect()
            for _ in range(rounds):
                usual.append(asyncio.run(stream_all(address(arm), None, weights, mode)))
                updated.append(asyncio.run(stream_all(address(arm), sender, weights, mode)))
        print(
            f"| longest gap of 8 streams, {mode} | {statistics.median(updated):.2f} s, usual "
            f"{statistics.median(usual):.2f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; without any: all")
    parser.add_argument("--model", default=str(demo_model_path()), help="folder of the model for the pause")
    parser.add_argument("--tp-size", type=int, default=1, help="for the transfer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--receive-at", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.receive_at is not None:
        receive_bare(args.receive_at)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        if "fixed" in parts:
            measure_fixed(args.rounds, Path(folder))
        if "transfer" in parts:
            measure_transfer(args.rounds, Path(folder), args.tp_size)
        if "pause" in parts:
            measure_pause(args.rounds, args.model)


if __name__ == "__main__":
    main()
