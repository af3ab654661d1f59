"""The part of the engine that holds tensors: the model, its KV cache, attention, and the execution of a plan."""
