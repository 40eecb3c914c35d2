"""Hugging Face folders: weights and small files, read and written."""
