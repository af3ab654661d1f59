"""The sampler: logits of a batch in, the next token of every sequence out. Each logits processor is one file."""
