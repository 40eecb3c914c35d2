"""Tokenizers as their own files define them, and added special tokens."""
