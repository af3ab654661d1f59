"""Schemas of the OpenAI API, for the API server and the workers: requests, routes, and common parts of the answers."""
