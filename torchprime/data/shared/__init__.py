"""Modules for all parts of the data path: checked values, notes, worker processes, a cache."""
