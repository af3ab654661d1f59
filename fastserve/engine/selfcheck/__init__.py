"""Checks at start that the engine computes what the model's own code does."""
