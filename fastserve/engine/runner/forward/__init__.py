"""The ways to compute the forward pass of a step."""
