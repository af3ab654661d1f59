"""LoRA adapters that are applied while a batch is computed: reading, memory, and products of mixed batches."""
