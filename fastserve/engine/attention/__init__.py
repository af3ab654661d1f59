"""Paged attention: the KV cache of all layers, the metadata of a step, and one backend for each kind of device."""
