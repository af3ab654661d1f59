"""Everything between text and token ids: tokenizer, chat template, detokeniser, stop strings. No torch here."""
