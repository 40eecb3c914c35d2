"""Runs beside each other: logs are read, aligned, judged and drawn."""
