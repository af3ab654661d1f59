"""Layers that replace those of a model: linear layers and experts with weight layouts, and fused layers."""
