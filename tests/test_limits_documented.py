"""docs/limits.md lists exactly the declared limits, with their defaults."""

from __future__ import annotations

import re
from pathlib import Path

from fastserve.config import ApiServerConfig, ControllerConfig, LauncherConfig, WorkerConfig
from fastserve.options import flag_of, limits_of

PAGE = Path(__file__).parents[1] / "docs" / "limits.md"
ROW = re.compile(r"^\| `(--[a-z0-9-]+)` \| `?([^|`]*)`? \|", re.MULTILINE)


def test_every_limit_is_documented_with_its_default() -> None:
    documented = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
    declared = {
        flag_of(item): "none"
        if item.default is None
        else f"{item.default:g}"
        if isinstance(item.default, float)
        else str(item.default)
        for config in (ControllerConfig, ApiServerConfig, WorkerConfig, LauncherConfig)
        for item in limits_of(config)
    }
    assert {flag: text.strip() for flag, text in documented.items()} == declared
