"""The controller: worker registry, dispatch and its HTTP endpoints."""
