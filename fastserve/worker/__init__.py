"""The worker's HTTP side: admission, OpenAI's and FastChat's routes, heartbeats. The engine is `fastserve.engine`."""
