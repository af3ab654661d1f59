"""The machines of one model, from rtp-llm's DISTRIBUTE_CONFIG_FILE.

    {"anything_part0": {"name": "anything_part0", "ip": "10.0.0.1", "port": 10000},
     "anything_part1": {"name": "anything_part1", "ip": "10.0.0.2"}}

The number after `_part` orders the machines; part 0 has rank 0. A machine without a port has that of part 0. rtp-llm
sorts names as strings, so that its part 10 comes before part 2; here parts are ordered as numbers, and "ip" may be a
host name.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve.distributed.problems import Problems
from fastserve.observability.text import printable

NUM_PORTS = 3
"""Consecutive ports of each machine, from its own on (gang.py)."""
MAX_FILE_BYTES = 2**20
MAX_MACHINES = 4096
MAX_HOST_CHARS = 253
_PART = re.compile(r"_part([0-9]{1,4})$")
_HOST = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")


@dataclass(frozen=True)
class Machine:
    part: int
    name: str
    ip: str
    """An IP address, or a host name, which stays when a machine gets another address."""
    port: int


def read_machines(path: Path, default_port: int, problems: Problems) -> list[Machine]:
    """The machines by part number; empty if something is wrong, which is added to `problems`.

    `default_port`: of part 0, if the file names none.
    """
    where = f"DISTRIBUTE_CONFIG_FILE={path}"
    try:
        # A bound, because the path may name a device that never ends.
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        entries = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except OSError as error:
        problems.add(f"{where} cannot be read: {error.strerror}.")
        return []
    except (ValueError, RecursionError) as error:
        problems.add(f"{where} is no JSON: {printable(str(error), 200)}.")
        return []
    if not isinstance(entries, dict) or not 0 < len(entries) <= MAX_MACHINES:
        problems.add(f"{where}: expected a JSON object with 1 to {MAX_MACHINES} machines, of at most 1 MiB.")
        return []
    found = Problems()
    machines = _machines(entries, where, default_port, found)
    if machines is None or found:
        problems.extend(found)
        return []
    return machines


def _machines(entries: Mapping[str, Any], where: str, default_port: int, problems: Problems) -> list[Machine] | None:
    parts: list[tuple[int, str, str, int | None]] = []
    for key, entry in entries.items():
        label = f"{where}, machine {printable(key, 80)}"
        part = _PART.search(key)
        if part is None:
            problems.add(f"{label}: the name must end in _part0, _part1 and so on.")
        if not isinstance(entry, dict):
            problems.add(f'{label}: expected an object with "name", "ip" and perhaps "port".')
            continue
        if entry.get("name") != key:
            problems.add(f'{label}: "name" must be the key itself, and is {_shown(entry.get("name"))}.')
        ip, port = _ip(entry.get("ip"), label, problems), _port(entry.get("port"), label, problems)
        if part is not None and ip is not None:
            parts.append((int(part[1]), key, ip, port))
    _check_parts([number for number, *_ in parts], len(entries), where, problems)
    if problems:
        return None
    parts.sort()
    first_port = parts[0][3] or default_port
    machines = [Machine(number, name, ip, port or first_port) for number, name, ip, port in parts]
    for (ip, port), count in Counter((machine.ip, machine.port) for machine in machines).items():
        if count > 1:
            names = ", ".join(printable(item.name, 80) for item in machines if (item.ip, item.port) == (ip, port))
            problems.add(f"{where}: {names} have the same address {ip}:{port}. Give each a port of its own.")
    return machines


def _check_parts(numbers: list[int], num_entries: int, where: str, problems: Problems) -> None:
    for number, count in Counter(numbers).items():
        if count > 1:
            problems.add(f"{where}: {count} machines are part {number}. Number them 0 to {num_entries - 1}, each once.")
    missing = sorted(set(range(num_entries)) - set(numbers))
    if missing and len(numbers) == num_entries:
        names = ", ".join(f"_part{number}" for number in missing[:5])
        problems.add(f"{where}: no machine is {names}. Number the {num_entries} machines 0 to {num_entries - 1}.")


def _ip(value: Any, label: str, problems: Problems) -> str | None:
    if isinstance(value, str):
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            # A name whose last part is digits is a mistyped address.
            if len(value) <= MAX_HOST_CHARS and _HOST.fullmatch(value) and not value.rpartition(".")[2].isdigit():
                return value
    problems.add(f'{label}: "ip" must be an IP address such as "10.0.0.1" or a host name, and is {_shown(value)}.')
    return None


def _port(value: Any, label: str, problems: Problems) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        problems.add(f'{label}: "port" must be a number from 1 to 65535, and is {_shown(value)}.')
        return None
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else printable(json.dumps(value), 80)
