"""docs/api.md is what its script makes of the schemas, and says of every field what it does."""

from __future__ import annotations

import re

from fastserve.openai.routes import RELAYED_ROUTES
from tools.api_page import OWN_ROUTERS, PAGE, heading, listed_routes, page


def test_the_page_is_that_of_the_schemas() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.api_page writes it anew"


def test_every_field_says_what_it_does() -> None:
    rows = re.findall(r"^\| `\w+`(?: \(required\))? \| .+ \| (.*) \|$", page(), re.MULTILINE)
    assert len(rows) > 200
    without = re.findall(r"^\| (`\w+`.*) \|  \|$", page(), re.MULTILINE)
    assert without == [], "these fields need docstrings"


def test_every_relayed_route_is_on_the_page() -> None:
    text = page()
    assert [route.path for route in RELAYED_ROUTES if f"## {heading(route)}\n" not in text] == []
    assert len(re.findall(r"^\| \[`", text, re.MULTILINE)) == len(RELAYED_ROUTES)


def test_every_route_that_the_api_server_answers_itself_is_on_the_page() -> None:
    text = page()
    routes = [f"| `{method} {path}` | " for router in OWN_ROUTERS.values() for method, path in listed_routes(router)]
    assert len(routes) > 25
    assert [route for route in routes if route not in text] == []


def test_every_post_route_with_a_body_has_its_table() -> None:
    """A new POST route of the API server needs its entry in `_OWN_BODIES`, unless it has no body."""
    posts = {
        path
        for router in OWN_ROUTERS.values()
        for method, path in listed_routes(router)
        if method == "POST" and not path.endswith("/cancel")
    }
    described = set(re.findall(r"`POST ([^`]+)`(?=[,:])", page()))
    assert posts - described == {"/v1/files"}, "the form of /v1/files is in its row"


def test_routes_of_the_api_server_are_all_on_the_page() -> None:
    """The heading of `OWN_ROUTERS` is there for each router that the application includes."""
    source = (PAGE.parents[1] / "fastserve" / "gateway" / "app.py").read_text(encoding="utf-8")
    assert len(re.findall(r"app\.include_router\(", source)) == len(OWN_ROUTERS)
