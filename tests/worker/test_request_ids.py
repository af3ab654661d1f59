"""The id of a request is the same in the answer's header and body and on both services."""

from __future__ import annotations

import json

import pytest

from tests.gateway.cluster import start_cluster
from tests.worker.conftest import MODEL, RunWorker

BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_header_and_body_have_one_id_whatever_was_sent(run_worker: RunWorker, stream: bool) -> None:
    async with (
        start_cluster(insecure=True) as cluster,
        run_worker(no_register=False, controller_address=NOBODY) as worker,
    ):
        cluster.controller.add(worker.url, MODEL)
        for address in (cluster.url, worker.url):
            for given in ("plain-1", "a/b=c;d,e", '{"x":"<y>"}', "two words", "é", "x" * 129, "", None):
                headers = {} if given is None else {"x-request-id": given}
                url = address + "/v1/completions"
                async with worker.http.post(url, json={**BODY, "stream": stream}, headers=headers) as response:
                    assert response.status == 200
                    text = await response.text()
                answer = json.loads(text.splitlines()[0].removeprefix("data: "))
                [named] = response.headers.getall("x-request-id")
                assert answer["id"] == f"cmpl-{named}"
                is_proper = given is not None and given.isascii() and " " not in given and 0 < len(given) <= 128
                assert (named == given) == is_proper
