"""The machines that compute one model together, and the addresses at which they reach each other.

On the machine with START_PORT P (each machine has its own), P is HTTP. On part 0, P + 1 is where the other ranks join
and get their plans. P + 2 is where the machine exchanges tensors with the others.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

import msgspec

from fastserve.distributed.environment import World
from fastserve.distributed.keys import ENV_GANG_KEY, CurveKeys
from fastserve.distributed.machines import Machine
from fastserve.errors import StartupError

_CONTROL_OFFSET = 1
_RELAY_OFFSET = 2
_SOCKET = "ranks"
_ANY_PORT = 9
_ONE_MACHINE_TIMEOUT_S = 1800.0


class Gang(msgspec.Struct, frozen=True):
    """The machines of a model, and which of them this one is."""

    machines: tuple[Machine, ...]
    local_size: int
    """Ranks on each machine."""
    part: int
    """Number of this machine."""
    timeout_s: float
    """Longest wait until all ranks have joined."""
    folder: str = ""
    """Where the ranks of this machine meet; private, and made with the first of them."""

    @classmethod
    def of(cls, world: World, machines: tuple[Machine, ...], timeout_s: float) -> Gang:
        return cls(machines, world.local_size, world.first_rank // world.local_size, timeout_s)

    @classmethod
    def of_one_machine(cls, size: int) -> Gang:
        """Ranks that are all on this machine, and need no network."""
        return cls((Machine(0, "", "", 0),), size, 0, _ONE_MACHINE_TIMEOUT_S)

    @property
    def is_one_machine(self) -> bool:
        return len(self.machines) == 1

    @property
    def size(self) -> int:
        return len(self.machines) * self.local_size

    @property
    def local_ranks(self) -> range:
        return range(self.part * self.local_size, (self.part + 1) * self.local_size)

    @property
    def master(self) -> Machine:
        return self.machines[0]

    @property
    def service_url(self) -> str:
        """Where clients reach the model."""
        return f"http://{_bracketed(self.master.ip)}:{self.master.port}"

    @property
    def control_port(self) -> int:
        return self.master.port + _CONTROL_OFFSET

    def relay_port(self, part: int) -> int:
        """Where that machine exchanges tensors with the others."""
        return self.machines[part].port + _RELAY_OFFSET

    def control_endpoint(self) -> str:
        """Where members reach rank 0."""
        if self.is_one_machine:
            return f"ipc://{self.folder}/{_SOCKET}"
        return endpoint(self.master.ip, self.control_port)

    def own_ip(self) -> str:
        """The address of this machine on its way to the others. Raises StartupError when there is no way."""
        if self.is_one_machine:
            return ""
        peer = self.master if self.part > 0 else self.machines[-1]
        return own_ip(peer.ip)

    def name_of(self, rank: int) -> str:
        if self.is_one_machine:
            return f"rank {rank}"
        machine = self.machines[rank // self.local_size]
        return f"rank {rank} ({machine.name}, {machine.ip})"


def own_ip(peer: str) -> str:
    """The address of the interface by which packets to `peer`, an address or a host name, leave; nothing is sent. The
    name of this machine would not do: it may resolve to 127.0.1.1. Raises StartupError when there is no route."""
    try:
        family, *_, address = socket.getaddrinfo(peer, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StartupError(f"This machine has no route to {peer}, another machine of the model: {error}.") from error


def endpoint(ip: str, port: int) -> str:
    """ZeroMQ's form of an address."""
    return f"tcp://{host_and_port(ip, port)}"


def host_and_port(ip: str, port: int) -> str:
    return f"{_bracketed(ip)}:{port}"


def read_gang_keys(environ: Mapping[str, str]) -> CurveKeys | None:
    """The keys of the ranks' sockets; None: they are open to everybody (--insecure)."""
    secret = environ.get(ENV_GANG_KEY)
    return None if secret is None else CurveKeys.derive(secret)


def _bracketed(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
