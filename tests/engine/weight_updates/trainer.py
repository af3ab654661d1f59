"""A trainer that knows torch.distributed alone: it makes the group as SGLang's trainers do, and broadcasts.

Run as `python trainer.py`; it reads a command in JSON from each line, and answers each with a line:
{"do": "join", ...} (torch's own way to a group under a name), "broadcast", "bucket", "leave", "die", "sum".
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous

groups: dict[str, Any] = {}


def join(port: int, rank: int, world_size: int, name: str, timeout_s: float = 20.0) -> None:
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size, rank, [], "gloo", PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {index: index for index in range(world_size)}
    groups[name] = group


def tensors(folder: str, names: list[str]) -> list[torch.Tensor]:
    stored = load_file(f"{folder}/model.safetensors")
    return [stored[name] for name in names]


def handle(command: dict[str, Any]) -> Any:
    group = groups.get(command.get("name", ""))
    root = command.get("root", 0)
    match command["do"]:
        case "join":
            join(command["port"], command.get("rank", 0), command["world_size"], command["name"])
        case "sum":
            dist.all_reduce(torch.ones(1), group=group)
        case "broadcast":
            found = tensors(command["folder"], command["names"])
            begin = time.perf_counter()
            for tensor in found[: command.get("only")]:
                dist.broadcast(tensor, root, group=group)
            return time.perf_counter() - begin
        case "bucket":
            parts = [tensor.flatten().view(torch.uint8) for tensor in tensors(command["folder"], command["names"])]
            for bucket in command["buckets"]:
                dist.broadcast(torch.cat(parts[:bucket]), root, group=group)
                del parts[:bucket]
        case "tiny":
            found = [torch.full((command["size"],), float(index)) for index in range(command["count"])]
            for tensor in found:
                dist.broadcast(tensor, root, group=group)
        case "leave":
            dist.destroy_process_group(groups.pop(command["name"]))
        case "die":
            os._exit(1)
    return None


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        answer = handle(json.loads(line))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
