"""LoRA adapters as PEFT writes them, merged into the weights of their base model while these are read. PEFT is not
needed."""
