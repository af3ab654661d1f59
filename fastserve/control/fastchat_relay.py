"""FastChat's `/worker_generate_stream` on the controller, which acts as one big worker.

The answer is a sequence of JSON records, each terminated by a NUL byte. Its status is always 200, and its last record
is the worker's last one or an error record.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing

from fastserve.control.registry import WorkerRegistry
from fastserve.control.worker_client import WorkerBrokenError, WorkerClient, WorkerUnreachableError
from fastserve.errors import (
    InvalidAnswerError,
    NoWorkerError,
    RequestKilledWorkersError,
    ShortageError,
    WorkerLostError,
    WorkerTimeoutError,
)
from fastserve.observability.text import printable

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
MAX_DEATHS = 2
"""A request that killed this many workers is not retried."""
MAX_HOPS = 4
"""Controllers in a chain."""
MAX_RECORD_BYTES = 2**24
"""Longest record of a worker. Each record holds the whole text so far."""


async def relay(
    registry: WorkerRegistry, client: WorkerClient, model: str, body: bytes, hops: str
) -> AsyncGenerator[bytes, None]:
    """Send `body` to a worker that serves `model`, and relay its records. `hops`: HOPS_HEADER for the worker.

    Another worker is tried if one cannot be reached and nothing has been relayed yet.
    """
    failed: list[str] = []
    num_deaths = 0
    started = False
    while len(failed) < MAX_ATTEMPTS and num_deaths < MAX_DEATHS:
        lease = uuid.uuid4().hex
        address = registry.acquire(model, lease, failed).address
        if not address:
            break
        outcome = "unused"
        try:
            async with (
                aclosing(client.generate_stream(address, body, lease, hops)) as pieces,
                aclosing(_whole_records(pieces)) as batches,
            ):
                async for records in batches:
                    started = True
                    yield records
            outcome = "success"
            return
        except (WorkerLostError, WorkerTimeoutError, InvalidAnswerError) as error:
            logger.warning("%s", printable(error.message))
            outcome = "failed"
            failed.append(address)
            is_unreachable = isinstance(error, WorkerUnreachableError)
            if is_unreachable:
                registry.report_failure(address)
            num_deaths += isinstance(error, WorkerBrokenError)
            if started or not is_unreachable:
                break
        except ShortageError as error:
            # This process has no file or port left, so no other worker could be reached either.
            yield _error_record(error.message, error.legacy_code)
            return
        finally:
            ended = [lease]
            registry.release(ended, ended if outcome == "failed" else (), ended if outcome == "unused" else ())
    if num_deaths >= MAX_DEATHS:
        yield _error_record(
            f"{num_deaths} workers died while they worked on this request, so it is not tried again.",
            RequestKilledWorkersError.legacy_code,
        )
    elif failed:
        yield _error_record("The worker went away or did not answer in time.", WorkerTimeoutError.legacy_code)
    else:
        yield _error_record(f"No worker serves the model {printable(model)!r} now.", NoWorkerError.legacy_code)


async def _whole_records(pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Regroup pieces into whole records, so that an error record can follow. Raises InvalidAnswerError."""
    rest = bytearray()
    has_records = False
    async for piece in pieces:
        records, end, tail = piece.rpartition(b"\0")
        if end:
            has_records = True
            yield bytes(rest) + records + end
            rest.clear()
        rest += tail
        if len(rest) > MAX_RECORD_BYTES:
            raise InvalidAnswerError(f"A record of the worker's answer is longer than {MAX_RECORD_BYTES} bytes.")
    if rest or not has_records:
        raise InvalidAnswerError("The worker's answer ended within a record, or had none.")


def _error_record(text: str, error_code: int) -> bytes:
    return json.dumps({"text": text, "error_code": error_code}).encode() + b"\0"
