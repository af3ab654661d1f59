"""How the demo model is made: its data, its tokenizer, its training. README.md tells the whole story."""
