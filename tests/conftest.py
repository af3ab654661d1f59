"""Set before anything imports torch, which imports triton where that is installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fastserve.access.cluster_key import ENV_CLUSTER_KEY
from tests.keys import CLUSTER_KEY

# Services that tests start inherit it: no test finds or makes the key of the user who runs them.
os.environ[ENV_CLUSTER_KEY] = CLUSTER_KEY

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels are interpreted. Its library looks at this when it is imported, and never again.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts a command in the background has it ignore SIGINT, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
