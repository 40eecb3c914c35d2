"""Weights in and out: Hugging Face folders are read, checked, written, and read back as proof."""
