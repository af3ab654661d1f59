"""From a folder to a model with its weights: formats, names, streaming, assembly, placement."""
