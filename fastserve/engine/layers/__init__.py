"""Layers that replace those of a model: linear layers with the layouts of their weights, experts, fused parts."""
