"""The engine: scheduler, paged KV cache, model runner, sampler; in a process of its own. Speaks no HTTP."""
