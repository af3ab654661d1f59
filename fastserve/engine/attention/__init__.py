"""Paged attention: the KV cache of all layers, where the tokens of a step lie, and who computes it."""
