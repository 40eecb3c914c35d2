"""Metrics of a run as records, and the writers that put them into files and on the terminal."""
