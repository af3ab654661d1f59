"""The API server: OpenAI-compatible routes, relayed to workers."""
