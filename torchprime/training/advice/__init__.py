"""Advice before a run: memory by kind on a named device, and values to start from."""
