"""A job as server-sent events: deltas, keep-alive comments, and exactly one end."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastserve.errors import FastserveError, InternalError
from fastserve.openai.answers import DONE, KEEP_ALIVE, Usage
from fastserve.worker.choice import Delta
from fastserve.worker.jobs import Job
from fastserve.worker.service import Answer, GenerationService

logger = logging.getLogger(__name__)


async def events(
    service: GenerationService, job: Job, write: Callable[[Delta], bytes], write_usage: Callable[[Usage], bytes] | None
) -> AsyncGenerator[bytes, None]:
    """`write` makes the events of a delta, or b"" when there is nothing to tell.

    An error before the first piece is raised, so that it gets its HTTP status; a later one is the last event.
    """
    answer = Answer(job)
    started = False
    try:
        async with aclosing(service.generate(job)) as batches:
            async for batch in batches:
                for delta in batch:
                    answer.runs[delta.choice].count(delta)
                piece = b"".join(map(write, batch)) if batch else KEEP_ALIVE
                if piece:
                    started = True
                    yield piece
    except FastserveError as error:
        if not started:
            raise
        logger.warning("request %s failed after its first byte: %s", job.caller.request_id, error.message)
        yield error.events()
        return
    except Exception:
        if not started:
            raise
        logger.exception("request %s failed after its first byte", job.caller.request_id)
        yield InternalError("The server failed on this request; its log has the cause.").events()
        return
    yield (b"" if write_usage is None else write_usage(answer.usage)) + DONE
