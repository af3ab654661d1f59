"""fastserve: an LLM serving system (controller, model workers, OpenAI-compatible API server, launcher)."""

__version__ = "0.1.0"
