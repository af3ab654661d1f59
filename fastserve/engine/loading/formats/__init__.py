"""Checkpoint formats. Each quantization method is one file, named like `quant_method` in config.json (`-` as `_`), with
a function `sources(tensors, settings, stated)` that returns the weights stored in the tensors."""
