"""A tokenizer as its own files define it, and new tokens in it."""
