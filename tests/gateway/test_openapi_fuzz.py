"""Requests that a fuzzer makes from `/openapi.json`: each answer is one that the description has."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    missing_required_header,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.gateway.whole_cluster import API_KEY, MODELS, run_whole_cluster

HEADERS = {"authorization": f"Bearer {API_KEY}"}
TIMEOUT_S = 20
CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance),
    *(response_headers_conformance, missing_required_header, ignored_auth),
]
"""Not checked: that all valid bodies are accepted and all others refused. Schemas cannot say all that is wrong, and
clients may leave out much that they should have sent.
"""
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
FEW = {"type": "integer", "minimum": 1, "maximum": 4}


def narrowed(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the served models as the only ones, and with short answers: most requests would not get
    further than these fields.
    """

    def narrow(schema: Any) -> None:
        if isinstance(schema, dict):
            properties = schema.get("properties")
            if isinstance(properties, dict):
                names = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "n", "best_of")
                properties.update({name: FEW for name in names if name in properties})
                if "model" in properties:
                    properties["model"] = {"enum": sorted(set(MODELS.values()))}
            for part in schema.values():
                narrow(part)
        elif isinstance(schema, list):
            for part in schema:
                narrow(part)

    narrow(description["components"])
    return description


def fuzz(url: str, description: dict[str, Any], num_examples: int) -> tuple[Counter[str], list[str]]:
    """Send so many valid and so many invalid requests to each operation. Returns the number of answers by operation,
    and the failed checks.
    """
    sent: Counter[str] = Counter()
    failures: list[str] = []
    operations: Any = schemathesis.openapi.from_dict(narrowed(description)).get_all_operations()
    for result in operations:
        fuzz_operation(result.ok(), url, num_examples, sent, failures)
    return sent, failures


def fuzz_operation(operation: Any, url: str, num_examples: int, sent: Counter[str], failures: list[str]) -> None:
    def send(case: Any) -> None:
        response = case.call(base_url=url, headers=HEADERS, timeout=TIMEOUT_S)
        sent[operation.label] += 1
        try:
            case.validate_response(response, headers=HEADERS, checks=CHECKS)
        except FailureGroup as group:
            failures.extend(f"{operation.label}: {case.body!r}: {failure}" for failure in group.exceptions)

    limits = settings(max_examples=num_examples, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    for mode in MODES:
        try:
            limits(given(case=operation.as_strategy(generation_mode=mode))(send))()
        except hypothesis.errors.Unsatisfiable:
            assert mode == schemathesis.GenerationMode.NEGATIVE  # nothing in it could be wrong


async def check_all_operations(folder: Path, num_examples: int) -> None:
    async with run_whole_cluster(folder) as cluster:
        async with cluster.http.get(cluster.url + "/openapi.json") as response:
            description = await response.json()
        sent, failures = await asyncio.to_thread(fuzz, cluster.url, description, num_examples)
    operations = {f"{method.upper()} {path}" for path, methods in description["paths"].items() for method in methods}
    assert set(sent) == operations
    assert failures == []


async def test_answers_are_those_of_the_description(tmp_path: Path) -> None:
    await check_all_operations(tmp_path, 1)


@pytest.mark.slow
async def test_answers_to_many_requests_are_those_of_the_description(tmp_path: Path) -> None:
    await check_all_operations(tmp_path, 30)
