"""Responses and conversations that the API server stores, for OpenAI's Responses API.

`create.py` resolves what a request refers to, relays it and stores its response; `background.py` does so without a
client; `routes.py` has the routes for what is stored. `entries.py` is the store, in one SQLite file (`database.py`) for
all API server processes.
"""
