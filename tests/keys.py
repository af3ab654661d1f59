"""The cluster key of all services started by tests, and the header for calling them directly."""

from __future__ import annotations

from typing import Any

UNGUARDED: dict[str, Any] = {"insecure": True, "no_worker_probe": True, "allowed_worker_networks": ("any",)}
"""Settings of a controller without access checks, for tests whose workers are only names."""

CLUSTER_KEY = "a-key-that-only-tests-use-0123456789"
CLUSTER = {"Authorization": f"Bearer {CLUSTER_KEY}"}
"""Header with the cluster key."""
