"""The cluster key of all services that tests start, and the header with which tests call them directly."""

from __future__ import annotations

from typing import Any

UNGUARDED: dict[str, Any] = {"insecure": True, "no_worker_probe": True, "allowed_worker_networks": ("any",)}
"""Settings of a controller in tests whose workers exist by name only: who and what is let in has tests of its own."""

CLUSTER_KEY = "a-key-that-only-tests-use-0123456789"
CLUSTER = {"Authorization": f"Bearer {CLUSTER_KEY}"}
"""Header for calls to a controller or a worker of a cluster."""
