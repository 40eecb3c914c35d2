"""Metrics: what a run says about itself, as records, written to files and the terminal."""
