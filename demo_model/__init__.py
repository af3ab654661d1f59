"""How the demo model is made: its data, its tokenizer, its training. See README.md."""
