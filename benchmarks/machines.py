"""A worker whose ranks are on several machines, all of which are this one: `python -m benchmarks.machines N FLAG ...`.

The flags are those of `fastserve.model_worker`. One rank is on each machine; they exchange over TCP on loopback, with
encryption. The machines take four ports each, from --port on.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import msgspec

from fastserve.distributed.gang import Gang
from fastserve.distributed.machines import NUM_PORTS, Machine
from fastserve.fleet.division import ENV_GANG

_TIMEOUT_S = 120.0


def main() -> None:
    size, flags = int(sys.argv[1]), sys.argv[2:]
    at = flags.index("--port") + 1
    ports = [int(flags[at]) + NUM_PORTS * part for part in range(size)]
    machines = tuple(Machine(part, f"m_part{part}", "127.0.0.1", port) for part, port in enumerate(ports))
    key = {"FASTSERVE_CLUSTER_KEY": secrets.token_urlsafe(32)}
    for part in reversed(range(size)):
        gang = msgspec.json.encode(Gang(machines, 1, part, _TIMEOUT_S)).decode()
        environ = os.environ | key | {ENV_GANG: gang}
        own_flags = [*flags[:at], str(ports[part]), *flags[at + 1 :], "--tp-size", str(size)]
        command = [sys.executable, "-m", "fastserve.gang_worker", *own_flags]
        if part > 0:
            subprocess.Popen(command, env=environ)
        else:
            # The process group is ended as a whole.
            os.execve(sys.executable, command, environ)


if __name__ == "__main__":
    main()
