"""Runs a job and writes its answer, streamed or whole, with the writer for its format."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastserve.errors import FastserveError
from fastserve.serving.errors import unexpected_error
from fastserve.worker.jobs import Job
from fastserve.worker.results import JobResult
from fastserve.worker.service import GenerationService
from fastserve.worker.writers import AnswerWriter

logger = logging.getLogger(__name__)


async def stream_answer(service: GenerationService, job: Job, writer: AnswerWriter) -> AsyncGenerator[bytes, None]:
    """The bytes of a streamed answer, with keep-alives and exactly one end.

    An error before the first bytes is raised, so that the response gets its HTTP status; a later one is written as the
    end of the stream.
    """
    result = JobResult(job)
    started = False
    try:
        async with aclosing(service.generate(job)) as batches:
            async for batch in batches:
                for delta in batch:
                    result.count(delta)
                piece = writer.write(batch) if batch else writer.keep_alive
                if piece:
                    started = True
                    yield piece
    except FastserveError as error:
        if not started:
            raise
        logger.warning("request %s failed after its first byte: %s", job.caller.request_id, error.message)
        yield writer.error(error)
        return
    except Exception:
        if not started:
            raise
        logger.exception("request %s failed after its first byte", job.caller.request_id)
        yield writer.error(unexpected_error())
        return
    yield writer.end(result.usage)


async def fold(service: GenerationService, job: Job) -> JobResult:
    """Collect the whole stream of a job; `AnswerWriter.whole` makes a body of the result."""
    result = JobResult(job)
    async with aclosing(service.generate(job)) as batches:
        async for batch in batches:
            for delta in batch:
                result.add(delta)
    return result
