"""Common to all HTTP processes of fastserve: bind, serve, drain, answer errors, stream, notice a client gone.

The port is bound before anything slow happens, so a port in use ends the start at once; requests are accepted (and
"Uvicorn running on" is logged) when the application's lifespan has started.
"""
