"""OpenAI's Files and Batches APIs: JSON lines of requests that are answered with the capacity that others leave.

`store.py` keeps files and batches for all API server processes, `lines.py` reads and writes their lines, `runner.py`
sends the requests of a batch, as many at once as `spare.py` allows, and `routes.py` has the routes.
"""
