"""Drawing the next token of every sequence of a batch. Each transform of the logits is a file of its own."""
