"""The HTTP server of all services: bind, serve, drain, answer errors, stream, detect disconnects.

The port is bound before anything slow happens, so a port in use ends the start at once. Requests are accepted (and
"Uvicorn running on" is logged) after the application's lifespan has started.
"""
