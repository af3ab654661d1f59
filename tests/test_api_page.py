"""docs/api.md is what its script makes of the schemas, and says of every field what it does."""

from __future__ import annotations

import re

from fastserve.openai.routes import RELAYED_ROUTES
from tools.api_page import PAGE, page


def test_the_page_is_that_of_the_schemas() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tools.api_page writes it anew"


def test_every_field_says_what_it_does() -> None:
    assert re.findall(r"^\| (`\w+`.*) \|  \|$", page(), re.MULTILINE) == [], "these fields need docstrings"


def test_every_relayed_route_is_on_the_page() -> None:
    text = page()
    assert [route.path for route in RELAYED_ROUTES if f"## `{route.method} {route.path}`\n" not in text] == []
