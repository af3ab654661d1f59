"""The HTTP response to a job, for all routes that generate text."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from fastserve.openai.answers import JSON
from fastserve.protocol import REQUEST_ID_HEADER
from fastserve.serving.responses import EVENT_STREAM, StreamResponse, run_until_disconnect
from fastserve.worker.answer import fold, stream_answer
from fastserve.worker.jobs import Job
from fastserve.worker.runtime import Runtime
from fastserve.worker.writers import AnswerWriter

CLIENT_GONE = 499
"""Status of a response that nobody will read."""
_BYTES_PER_LOGPROB = 16
"""Work of writing one log probability, as bytes of a body of the same cost (see `PromptPool.run`)."""


async def respond(
    request: Request, runtime: Runtime, job: Job, writer: AnswerWriter, stream_type: str = EVENT_STREAM
) -> Response:
    """Run the job and write its answer, streamed or whole. Raises FastserveError if it fails before its first byte.

    `stream_type`: media type of a stream.
    """
    headers = {REQUEST_ID_HEADER: job.caller.request_id}
    if job.answer.stream:
        response = StreamResponse(stream_answer(runtime.service, job, writer), stream_type)
        response.headers.update(headers)
        return response
    result = await run_until_disconnect(request, fold(runtime.service, job))
    if result is None:
        return Response(status_code=CLIENT_GONE)
    body = await runtime.pool.run(written_bytes(job), lambda: writer.whole(result))
    return Response(body, media_type=JSON, headers=headers)


def written_bytes(job: Job) -> int:
    """Approximate work of writing the prompt into the answer, for `PromptPool.run`; 0 if the answer has no prompt."""
    options = job.answer
    if not options.echo and options.prompt_logprobs is None:
        return 0
    return job.prompt_tokens * (1 + max(options.logprobs or 0, options.prompt_logprobs or 0)) * _BYTES_PER_LOGPROB
