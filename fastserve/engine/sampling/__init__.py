"""The sampler: samples the next token of each sequence from a batch of logits. Each logits processor is one file."""
