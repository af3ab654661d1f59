"""`python -m fastserve.gang_worker FLAG ...`: one machine's part of a model worker that is divided over several.

The flags are those of `fastserve.model_worker`; FASTSERVE_GANG names the machines.
"""

from __future__ import annotations

import os
import sys

import msgspec

from fastserve import model_worker
from fastserve.distributed.gang import Gang
from fastserve.fleet.division import ENV_GANG


def main() -> None:
    gang = msgspec.json.decode(os.environ[ENV_GANG], type=Gang)
    model_worker.main(sys.argv[1:], gang if len(gang.machines) > 1 else None)


if __name__ == "__main__":
    main()
