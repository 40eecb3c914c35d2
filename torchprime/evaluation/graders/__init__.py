"""Graders, which turn a generated answer and its reference into a number."""
