"""Set before anything imports torch, which imports triton where that is installed."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's kernels are interpreted. Its library looks at this when it is imported, and never again.
    os.environ.setdefault("TRITON_INTERPRET", "1")
