"""Formats of checkpoints. A quantized one is a file here, named as `quant_method` in config.json names it (`-` as `_`),
with `sources(tensors, settings, stated)`: the weights that the stored tensors make up."""
