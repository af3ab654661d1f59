"""FastChat's `/worker_generate_stream` on the controller: it acts as one big worker.

The answer is a row of JSON records, each ended by a NUL byte, with HTTP 200 whatever happens; it ends in exactly one
terminal record, the worker's own or one error record.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastserve.control.registry import WorkerRegistry
from fastserve.control.worker_client import WorkerClient, WorkerUnreachableError
from fastserve.errors import NoWorkerError, WorkerLostError, WorkerTimeoutError
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)


async def relay(registry: WorkerRegistry, client: WorkerClient, model: str, body: bytes) -> AsyncGenerator[bytes, None]:
    """Send `body` to a worker that serves `model` and pass whole records on.

    A worker that cannot be reached is replaced by another as long as nothing has been passed on.
    """
    lease = uuid.uuid4().hex
    failed: list[str] = []
    started = False
    outcome = "unused"
    try:
        while address := registry.acquire(model, lease, failed).address:
            try:
                async with aclosing(client.generate_stream(address, body, lease)) as pieces:
                    rest = b""
                    async for piece in pieces:
                        # Only whole records leave, so that an error record never lands in the middle of one.
                        records, end, rest = (rest + piece).rpartition(b"\0")
                        if end:
                            started = True
                            yield records + end
                if rest:
                    yield rest + b"\0"
                outcome = "success"
                return
            except WorkerUnreachableError as error:
                logger.warning("%s", printable(error.message))
                registry.report_failure(address)
                failed.append(address)
                if started:
                    break
            except (WorkerLostError, WorkerTimeoutError) as error:
                logger.warning("%s", printable(error.message))
                failed.append(address)
                outcome = "failed"
                break
        if failed:
            yield _error_record("The worker went away or did not answer in time.", WorkerTimeoutError.legacy_code)
        else:
            yield _error_record(f"No worker serves the model {printable(model)!r} now.", NoWorkerError.legacy_code)
    finally:
        ended = [lease]
        registry.release(ended, ended if outcome == "failed" else (), ended if outcome == "unused" else ())


def _error_record(text: str, error_code: int) -> bytes:
    return json.dumps({"text": text, "error_code": error_code}).encode() + b"\0"
