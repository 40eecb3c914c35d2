"""Comparison of runs: logs are read, aligned, judged and drawn."""
