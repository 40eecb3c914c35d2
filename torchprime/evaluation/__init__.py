"""Evaluation on held-out rows: loss, generated answers and their grades, checkpoint selection."""
