"""Clients of other projects against the demo model, each by a script that runs in an environment with its package."""

from pathlib import Path

MODEL = "fastserve-demo"
FOLDER = Path(__file__).parent
