"""Calls to an engine: one file for each, with request, reply and handler; `all_calls.py` lists them."""
