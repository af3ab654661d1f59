"""The worker's HTTP half: admission, text, OpenAI's and FastChat's routes, heartbeats. The engine is elsewhere."""
