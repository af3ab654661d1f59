"""The description of the API: complete, readable by machines and by people without a network."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.gateway.cluster import Cluster, start_cluster


def resolve(description: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Resolve a schema reference."""
    found: Any = description
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


async def test_openapi_describes_every_route_with_its_request(cluster: Cluster) -> None:
    async with cluster.http.get(cluster.url + "/openapi.json") as response:
        assert response.status == 200
        description = await response.json()
    assert set(description["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    for path, required in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
        route = description["paths"][path]["post"]
        schema = resolve(description, route["requestBody"]["content"]["application/json"]["schema"])
        assert required in schema["required"]
        assert {"model", "stream", "temperature", "max_tokens"} <= set(schema["properties"])
        assert {"200", "400", "429", "503"} <= set(route["responses"])
    references = set(re.findall(r'"\$ref": ?"([^"]+)"', json.dumps(description)))
    assert references
    for reference in references:
        assert resolve(description, {"$ref": reference})


async def test_the_page_shows_every_route_and_loads_nothing_from_elsewhere(cluster: Cluster) -> None:
    async with cluster.http.get(cluster.url + "/docs") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/html")
        page = await response.text()
    for words in ("POST /v1/chat/completions", "GET /v1/models", "messages (required)", "temperature", "Retry-After"):
        assert words in page
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)


async def test_the_description_is_guarded_by_keys() -> None:
    async with start_cluster(api_keys=("sk-one",)) as cluster:
        for path in ("/openapi.json", "/docs"):
            async with cluster.http.get(cluster.url + path) as response:
                assert response.status == 200
            async with cluster.http.get(cluster.url + path, headers={"authorization": ""}) as response:
                assert response.status == 401
