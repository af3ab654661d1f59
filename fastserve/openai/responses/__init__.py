"""OpenAI's Responses API: the schema of a request, its translation into a chat request, and the answer's objects."""
