"""Held-out rows among the training rows: exact and near duplicates."""
