"""Models whose answer is a vector or a score for each text: encoders, decoders as embedders, cross-encoders."""
