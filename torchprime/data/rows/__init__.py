"""Rows from records: a prompt and its completion, or a conversation."""
